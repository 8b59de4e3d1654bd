"""The device, and in which type a model's weights lie and compute there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from finetune_kit.errors import SettingsError
from finetune_kit.settings.schema import ModelConfig

if TYPE_CHECKING:
    import torch


PLANNED: ContextVar[str | None] = ContextVar("PLANNED", default=None)  # the kind of device that a plan is for


def weight_dtype(model: ModelConfig, trained_in_full: bool) -> torch.dtype:
    """float32 for weights that are trained; bfloat16 for frozen ones where the device computes in it."""
    import torch

    if model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.dtype)
        if trained_in_full and dtype != torch.float32:
            raise SettingsError(
                f"model.dtype={model.dtype}: weights that are trained need float32, or small updates round to nothing.",
                "Leave it out: on a GPU the arithmetic is done in bfloat16 all the same. Or train an adapter: lora_sft",
            )
        return dtype
    return torch.bfloat16 if computes_in_bfloat16() and not trained_in_full else torch.float32


def computes_in_bfloat16() -> bool:
    """True on a GPU with bfloat16 units. On a CPU without them bfloat16 is eight times slower than float32.

    Everything that depends on it asks this function; a GPU without them trains in float32.
    """
    return _has_bfloat16_units()


def _has_bfloat16_units() -> bool:
    """Where a test puts another device's answer."""
    import torch

    if (kind := PLANNED.get()) is not None:
        return kind == "cuda"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def device() -> torch.device:
    """CUDA, else MPS, else the CPU; inside `planning_for`, what is planned for."""
    import torch

    if (kind := PLANNED.get()) is not None:
        return torch.device(kind)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def planning_for(kind: str | None) -> Iterator[None]:
    """In here `device` and `computes_in_bfloat16` answer for a machine with a cuda, cpu or mps device, to count what it
    would need: nothing may be put on it. cuda is a GPU with bfloat16 units, unless the one here is asked for. None, or
    the kind that is here: this machine.
    """
    token = PLANNED.set(None)
    if kind not in (None, device().type):
        PLANNED.set(kind)
    try:
        yield
    finally:
        PLANNED.reset(token)
