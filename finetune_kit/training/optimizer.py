"""Bytes of an optimizer's state, by its name."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from finetune_kit.models.device import device
from finetune_kit.settings.checks import MUON
from finetune_kit.training.arguments import DEFAULT_OPTIMIZER

if TYPE_CHECKING:
    pass


def optimizer_state(policy: Any, optim: str) -> int:
    """Bytes of the optimizer's state: exact for AdamW, AdamW and Lion of bitsandbytes, Adafactor and SGD without
    momentum; others count as AdamW."""
    import torch

    name = DEFAULT_OPTIMIZER if optim == "auto" else optim
    embeddings = {id(m.weight) for m in policy.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if name == MUON:
        from finetune_kit.training.muon import matrices_of

        matrices, others = matrices_of(policy)
        return 4 * sum(map(torch.numel, matrices)) + sum(8 * weight.numel() + 4 for weight in others)
    if name == "sgd":
        return 0
    if name == "adafactor":
        return sum(_adafactor(parameter.shape) for parameter in trained)
    by_bitsandbytes = name.endswith(("_8bit", "_32bit")) or name in ("ademamix", "rmsprop_bnb")
    if not by_bitsandbytes or name == "adamw_torch_8bit":
        return sum(8 * parameter.numel() + 4 for parameter in trained)  # two moments and the step's number
    moments = 1 if "lion" in name or "rmsprop" in name else 3 if "ademamix" in name else 2
    total = 0
    for parameter in trained:
        size = parameter.numel()
        # small weights and embeddings keep float32; the others a byte each, and a float32 scale for 256
        small = "8bit" not in name or size < 4096 or id(parameter) in embeddings
        total += moments * (4 * size if small else size + 4 * ceil(size / 256))
    return total + (4 * 256 * min(moments, 2) if "8bit" in name else 0)  # a table of 256 values with and without sign


def optimizer_scratch(policy: Any, optim: str) -> int:
    """Bytes that an optimizer step needs for the moment, beside gradients and state: on CUDA unfused AdamW takes
    the roots of all second moments at once; the fused one, and bitsandbytes', go through each weight in place."""
    if device().type != "cuda" or optim != "adamw_torch":
        return 0
    return sum(4 * parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def _adafactor(shape: Any) -> int:
    """A float32 for each row and each column of a matrix, for each element of a vector; and the weights' mean size."""
    if len(shape) < 2:
        return int(4 * shape.numel() + 4)
    return int(4 * (shape[:-1].numel() + shape[:-2].numel() * shape[-1]) + 4)
