"""Muon for the matrices of the layers, AdamW for embeddings, head and norms, as one optimizer with one learning rate.

Muon moves a matrix by its momentum with all singular values made about equal (Jordan 2024). Its steps are scaled to the
size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so a rate that suits the one suits the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetune_kit import distributed
from finetune_kit.errors import SettingsError
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.device import computes_in_bfloat16
from finetune_kit.settings.schema import TrainConfig

AS_ADAMW = 0.2  # root mean square of AdamW's update


class InFloat32(torch.optim.Muon):
    """torch's Muon for a device without bfloat16 units, where its products in bfloat16 take 30 times as long.

    The same update in float32; `adjust_lr_fn` is match_rms_adamw.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * AS_ADAMW * math.sqrt(max(weight.shape)))
        return None


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix (m, n) with its singular values brought to about 1, between 0.5 and 1.5, by Newton and Schulz."""
    a, b, c = coefficients
    found = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if matrix.shape[0] > matrix.shape[1] else found


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer of two parts. The first group, of matrices, is Muon's, the second AdamW's; both share the state, so
    that a checkpoint has it as of any other."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor], train: TrainConfig) -> None:
        kind = torch.optim.Muon if computes_in_bfloat16() else InFloat32
        self.parts: list[torch.optim.Optimizer] = [
            kind(matrices, train.learning_rate, train.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, train.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        super().__init__([part.param_groups[0] for part in self.parts], {})
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for part in self.parts:
            part.step()
        return None


def muon_of(train: TrainConfig) -> tuple[Callable[[], Callable[..., MuonAndAdamW]], dict[str, Any]]:
    """`optimizer_cls_and_kwargs` of a trainer of transformers, which makes the optimizer of its model."""

    def make(model: Any) -> MuonAndAdamW:
        return MuonAndAdamW(*matrices_of(model), train)

    return lambda: make, {}


def matrices_of(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices of the layers, all other weights) that are trained: embeddings and head are not in a layer, tied or
    not. Raises SettingsError for an adapter and for shards."""
    if is_adapter(model):
        raise SettingsError(
            "train.optim=muon: it is for whole matrices, not for an adapter's.", "Leave train.optim out."
        )
    if sharding := distributed.sharding():
        raise SettingsError(f"train.optim=muon needs whole matrices; {sharding} cuts them.", "Leave train.optim out.")
    ends = {
        id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None
    }
    ends |= {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.dim() == 2 and id(weight) not in ends]
    known = {id(weight) for weight in matrices}
    return matrices, [weight for weight in trained if id(weight) not in known]
