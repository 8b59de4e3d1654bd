"""Is every trained tensor in the saved files, equal in type and in every bit? Files against memory: it always fits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import NumericsError
from finetune_kit.models.adapters import is_adapter

if TYPE_CHECKING:
    import torch


def check_saved_tensors(model: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> int:
    """Compare every trained tensor in memory with the one in the folder's safetensors files; how many there are.

    `weights`: those of a model that is cut into shards, gathered. Raises NumericsError naming a tensor that is missing,
    or differs in type, shape or a bit.
    """
    from safetensors import safe_open

    adapter = is_adapter(model)
    files = [folder / "adapter_model.safetensors"] if adapter else sorted(folder.glob("model*.safetensors"))
    where: dict[str, Any] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    wrong = []
    expected = list(_trained(model, weights) if adapter else _whole(model, weights))
    for names, tensor in expected:
        found = [name for name in names if name in where]
        if not found:
            wrong.append(f"{names[0]} is not in it")
        for name in found:
            with safe_open(where[name], framework="pt") as file:
                if not _same_bits(file.get_tensor(name), tensor):
                    wrong.append(f"{name} is another one")
    if wrong or not expected:
        raise NumericsError(
            f"What was saved in {folder} is not what was trained: of {len(expected)} trained tensors {len(wrong)} "
            f"differ; {(wrong or ['there is none'])[0]}.",
            "The folder is kept for inspection. Please report this with its run.yaml.",
        )
    return len(expected)


def _trained(model: Any, weights: dict[str, torch.Tensor] | None) -> Iterator[tuple[list[str], torch.Tensor]]:
    """(names in the file, tensor) of every trained tensor of a model with an adapter: its own, and whole modules."""
    adapter = re.escape(model.active_adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            saved = re.sub(rf"\.modules_to_save\.{adapter}\.", ".", name)
            saved = re.sub(rf"\.(lora_\w+)\.{adapter}(?=\.|$)", r".\1", saved)
            saved = saved.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")  # PEFT's for DoRA
            yield [saved], parameter.detach() if weights is None else weights[name]


def _whole(model: Any, weights: dict[str, torch.Tensor] | None) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The same of a model that was trained in full: tied weights have several names, of which the file has one or all.

    transformers writes some layers (experts) otherwise than it holds them; by its own function they are made so here.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    first: dict[Any, torch.Tensor] = {}  # of tied weights, which may get other names, one tensor stands for all
    given = model.state_dict() if weights is None else weights
    one = {name: first.setdefault(parameters.get(name, name), tensor) for name, tensor in given.items()}
    tensors = revert_weight_conversion(model, one)
    tied: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), []).append(name)
    for names in tied.values():
        yield names, tensors[names[0]]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    ours, theirs = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(ours, theirs)
