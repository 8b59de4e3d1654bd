"""The value: one number for each completion token, from a head on hidden states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_kit.errors import SettingsError
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.completion_rows import Rows, states
from finetune_kit.models.device import device
from finetune_kit.models.provenance import check_base
from finetune_kit.models.reward import load_scorer
from finetune_kit.models.second_adapter import adapter, add_second_adapter, head_of
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import ModelConfig

NAME = "value_adapter"  # the name of the second adapter in the policy


class Value(torch.nn.Module):
    """`value(policy, rows, hidden)` -> (s,): V before each completion token of `rows`, float32.

    kind "shared": the head reads the policy's own hidden states (s, h), and its loss moves the policy's trunk, too.
    "adapter": those of the same base with an adapter of the value's own. "separate": those of `trunk`, another model.
    """

    def __init__(self, kind: str, hidden_size: int, trunk: Any = None) -> None:
        super().__init__()
        self.kind, self.trunk = kind, trunk
        self.head = torch.nn.Linear(hidden_size, 1, device=device(), dtype=torch.float32)
        torch.nn.init.zeros_(self.head.weight)  # nothing is expected before anything was seen
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, policy: Any, rows: Rows, hidden: Tensor) -> Tensor:
        if self.kind == "adapter":
            with adapter(policy, NAME):
                hidden = states(policy, rows, head=False)[1]
        elif self.kind == "separate":
            output = self.trunk(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
            hidden = rows.states(output.last_hidden_state).float()
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden, self.head.weight, self.head.bias)[:, 0]


def build_value(kind: str, policy: Any, model: ModelConfig, init_from: str | None = None, seed: int = 0) -> Value:
    """The value of `kind` for a policy, from zero or from the reward model in the folder `init_from`.

    With "adapter" the policy gets a second adapter. Raises SettingsError where kind, policy and folder do not fit.
    """
    size = policy.get_output_embeddings().weight.shape[1]  # of OPT's smaller models another than hidden_size
    folder = Path(init_from).expanduser() if init_from else None
    if kind == "shared":
        if folder is not None:
            message = (
                "value_init_from: a head fits the trunk it was trained on, and value_model=shared has the policy's."
            )
            raise SettingsError(
                message, "Set value_model=adapter (reward model with an adapter) or separate (in full)."
            )
        return Value(kind, size)
    if kind == "adapter":
        value = Value(kind, size)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the adapter's A starts at random
            _add_adapter(policy, model, folder, value)
        return value
    return _separate(model, folder)


def value_parameters(value: Value, policy: Any) -> dict[str, torch.nn.Parameter]:
    """What is trained of the value, by name, its adapter in the policy included."""
    named = {f"value.{name}": parameter for name, parameter in value.named_parameters()}
    if value.kind == "adapter":
        named |= {name: parameter for name, parameter in policy.named_parameters() if f".{NAME}." in name}
    return named


def _add_adapter(policy: Any, model: ModelConfig, folder: Path | None, value: Value) -> None:
    if not is_adapter(policy):
        raise SettingsError(
            "value_model=adapter needs a policy with an adapter; this one is trained in full.",
            "Set value_model=shared or separate.",
        )
    if folder is not None:
        _check_adapter(folder)
        check_base(model, folder)
    tensors = add_second_adapter(policy, NAME, folder, trained=True)
    if folder is not None:
        _put_head(value, tensors, folder)


def _check_adapter(folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file():
        raise SettingsError(
            f"value_init_from={folder}: no adapter there, and value_model=adapter needs one.",
            "Set value_model=separate for a reward model trained in full.",
        )


def _separate(model: ModelConfig, folder: Path | None) -> Value:
    if folder is not None and not (folder / "config.json").is_file():
        raise SettingsError(
            f"value_init_from={folder}: no whole model there, and value_model=separate needs one.",
            "Set value_model=adapter for a reward model with an adapter.",
        )
    source = model if folder is None else replace(model, name_or_path=str(folder), revision=None)
    tokenizer = load_tokenizer(source)
    whole = load_scorer(source, tokenizer, [tokenizer.eos_token_id], trained_in_full=True)
    value = Value("separate", whole.score.weight.shape[1], whole.base_model)
    if folder is not None:
        _put_head(value, {"score.weight": whole.score.weight.detach()}, folder)
    return value


def _put_head(value: Value, tensors: dict[str, Tensor], folder: Path) -> None:
    with torch.no_grad():
        value.head.weight.copy_(head_of(tensors, folder, value.head.weight.shape[1]))
