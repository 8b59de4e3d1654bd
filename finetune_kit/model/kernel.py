"""Attention of packed rows on CUDA: one call of torch's varlen kernel for all segments, and where it cannot be had."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from finetune_kit.model.layout import Segment, tokens_of
from finetune_kit.model.load import computes_in_bfloat16

if TYPE_CHECKING:
    import torch

# as torch.nn.attention.varlen.varlen_attn: (query, key, value, cumulative query and key lengths, the longest of each;
# scale, window_size, enable_gqa) -> what the queries see. The last query of a segment stands at its last key.
Kernel = Callable[..., "torch.Tensor"]


@dataclass(frozen=True)
class Varlen:
    """A varlen kernel and what it is told of the segments.

    queries, keys: (segments + 1,) int32, cumulative lengths of the segments and of what each sees: those before it in
    its rows, and itself. longest: of each. seen: (k,), the packed tokens seen, one segment's after the other's; None:
    each sees itself alone.
    """

    kernel: Kernel
    queries: torch.Tensor
    keys: torch.Tensor
    longest: tuple[int, int]
    seen: torch.Tensor | None


def make_varlen(segments: Sequence[Segment], kernel: Kernel, device: torch.device) -> Varlen:
    """What a kernel is told of a plan's segments."""
    import torch

    queries = [segment.length for segment in segments]
    parts = [(*segment.before, segment) for segment in segments]
    keys = [sum(part.length for part in seen) for seen in parts]
    every = torch.cat([tokens_of(part) for seen in parts for part in seen]).to(device)
    ends = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (queries, keys)]
    return Varlen(kernel, ends[0], ends[1], (max(queries), max(keys)), every if keys != queries else None)


def attend_at_once(
    varlen: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All segments in one call of the kernel; shapes as in `attend`. In autocast's type, as SDPA would."""
    import torch

    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    if varlen.seen is not None:
        key, value = key[varlen.seen], value[varlen.seen]
    acts = sliding_window is not None and sliding_window < varlen.longest[1]
    output = varlen.kernel(
        query,
        key,
        value,
        varlen.queries,
        varlen.keys,
        *varlen.longest,
        scale=scaling,
        # how many keys back and ahead of its own a query sees: a window of w tokens has that one in it
        window_size=(sliding_window - 1 if acts and sliding_window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


def varlen_kernel(device: torch.device) -> Kernel | None:
    """What attends on a device: torch's varlen attention on CUDA; None: SDPA, segment by segment."""
    if device.type != "cuda":
        return None
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn  # typed as a pair with what is not asked for here
    return kernel  # type: ignore[no-any-return]


def refusal(device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """Why rows are not packed on a device where a model of `config` attends in `dtype`; "" where they are.

    The limits are those of the flash-attention kernel behind torch's varlen attention.
    """
    import torch

    if device.type == "cpu":
        return ""
    kernel = varlen_kernel(device)
    if kernel is None:
        return f"the packed forward is not proven on {device.type} yet"
    missing = {"scale", "window_size", "enable_gqa"} - inspect.signature(kernel).parameters.keys()
    if missing:
        return f"varlen attention of torch {torch.__version__} lacks {min(missing)}: torch 2.13 has it"
    if not computes_in_bfloat16():
        return "varlen attention needs a GPU with bfloat16 units"
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim % 8 or head_dim > 256:
        return f"varlen attention takes heads of 8, 16, … 256 numbers, not {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen attention does not compute in {str(dtype).removeprefix('torch.')}"
    return ""


def attention_dtype(causal: Any) -> torch.dtype:
    """The type that a model attends in: autocast's, else its weights'."""
    import torch

    device = causal.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else causal.dtype
    return dtype


def as_in_training(device: torch.device) -> AbstractContextManager[Any]:
    """The trainers' mixed precision. Weights are not kept in its type: a copy made without gradient would have none."""
    import torch

    mixed = device.type == "cuda" and computes_in_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)
