"""Stops a run before a number that is not finite can move a weight."""

from __future__ import annotations

import math
from typing import Any

from finetune_kit.errors import NumericsError

CAUSES = "Likely causes: a learning_rate too high, float16 overflow, a broken row. Try a tenth of train.learning_rate."


def finite_gradients(args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
    """Before the optimizer moves anything: raises NumericsError when a gradient is not finite."""
    import torch

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # a NaN or an infinity anywhere makes its own norm NaN or infinite
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
    if not bool(torch.isfinite(norms).all()):
        step = state.global_step + 1
        raise NumericsError(f"A gradient is not finite at step {step}; no weight has been moved by it.", CAUSES)


def finite_log(args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
    """At each logged step: raises NumericsError when the loss or the gradient norm is not finite."""
    for name in ("loss", "grad_norm"):
        if name in logs and not math.isfinite(logs[name]):
            raise NumericsError(f"{name} is {logs[name]} at step {state.global_step}.", CAUSES)
