"""In which arithmetic a model computes: as in training, or plainly, in the type of its weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from finetune_kit import distributed
from finetune_kit.models import device


def as_trained(model: Any) -> AbstractContextManager[Any]:
    """The trainers' mixed precision: products in bfloat16 where the device computes in it, else as the weights are.

    To be entered without gradients. Weights in float32 are cast once for as long as it lasts, but those of a model in
    shards, which are there for a layer's time alone.
    """
    import torch

    if not device.computes_in_bfloat16():
        return contextlib.nullcontext()
    return torch.autocast(device.device().type, torch.bfloat16, cache_enabled=not distributed.is_sharded(model))


@contextlib.contextmanager
def as_loaded(model: Any) -> Iterator[None]:
    """No mixed precision, nothing compiled, no TF32: what a process computes that has just loaded the weights."""
    import torch

    plain_forward(model)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(model.device.type, enabled=False), _nothing_compiled():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _nothing_compiled() -> AbstractContextManager[Any]:
    import torch

    if "torch._dynamo" not in sys.modules:  # its import takes seconds
        return contextlib.nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def plain_forward(model: Any) -> None:
    """Take away the mixed precision that accelerate has put around `forward` for training and left there.

    accelerate's own `unwrap_model(keep_fp32_wrapper=False)` would take the model's decorators off, too, such as the
    one that heeds `return_dict`.
    """
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = original
