"""A second LoRA adapter in a policy: a value's or a reward model's, beside the one that is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_kit.errors import SettingsError
from finetune_kit.models.adapter_config import read_adapter_config


@contextmanager
def adapter(policy: Any, name: str | None) -> Iterator[None]:
    """The policy with its adapter `name` in the place of the active one, or with none; trained weights stay trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    active = policy.active_adapter
    if name is None:
        policy.base_model.disable_adapter_layers()
    else:
        policy.set_adapter(name)
    try:
        yield
    finally:
        if name is None:
            policy.base_model.enable_adapter_layers()
        else:
            policy.set_adapter(active)
        for parameter in trained:  # PEFT freezes whatever is not active
            parameter.requires_grad_(True)


RUN_AN_ADAPTER = "Name the folder of a reward_model run on the policy's base."


def add_second_adapter(policy: Any, name: str, folder: Path | None, trained: bool) -> dict[str, Tensor]:
    """Add a LoRA adapter `name` to a policy that has one, which stays the active one: fresh and of the policy's shape,
    or the one in `folder`, whose tensors are returned. Raises SettingsError where its layers are not the policy's.
    """
    config = copy.deepcopy(policy.peft_config[policy.active_adapter])
    config.modules_to_save = None
    tensors: dict[str, Tensor] = {}
    if folder is not None:
        saved = read_adapter_config(folder)
        shape = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "use_dora", "lora_dropout")
        for key in shape:
            setattr(config, key, saved[key])
        tensors = _tensors(folder / "adapter_model.safetensors")
    policy.add_adapter(name, config)
    own = {full: parameter for full, parameter in policy.named_parameters() if f".{name}." in full}
    for parameter in own.values():
        parameter.requires_grad_(trained)
    if folder is None:
        return tensors
    # base_model.model.model.layers.0.….lora_A.weight there is ….lora_A.<name>.weight here
    found = {full.removesuffix(".weight") + f".{name}.weight": tensor for full, tensor in tensors.items()}
    lora = {full: tensor for full, tensor in found.items() if ".lora_" in full}
    if lora.keys() != own.keys():
        raise SettingsError(f"{folder} is an adapter with other layers than the policy's base.", RUN_AN_ADAPTER)
    with torch.no_grad():
        for full, tensor in lora.items():
            own[full].copy_(tensor)
    return tensors


def head_of(tensors: dict[str, Tensor], folder: Path, width: int) -> Tensor:
    """The head of a reward model among its saved tensors, (1, width). Raises SettingsError where there is none."""
    weight = next((tensor for name, tensor in tensors.items() if name.endswith("score.weight")), None)
    if weight is None or weight.shape != (1, width):
        shape = None if weight is None else tuple(weight.shape)
        raise SettingsError(f"{folder}: expected a score.weight of {(1, width)}, found {shape}.", RUN_AN_ADAPTER)
    return weight


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors
