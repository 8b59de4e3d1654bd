"""Attention of packed segments where no one call serves all: SDPA segment by segment, the same as one operation for
compiled layers, and flex attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune_kit.packing.plan import Plan, Segment

NO_WINDOW = 2**31 - 1  # tokens


def by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Sequence[tuple[int, Sequence[int]]],
    scaling: float | None,
    sliding_window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """query (1, heads, n, d), key and value (1, key heads, n, d) -> (1, heads, n, d). `seen`: each segment's length,
    and the numbers of those before it in its rows."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    # by split, whose gradient is one cat: that of a slice is as long as the packed row
    lengths = [length for length, _ in seen]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for index, (length, before) in enumerate(seen):
        its_keys, its_values = (torch.cat([s[part] for part in (*before, index)], dim=2) for s in (keys, values))
        mask = _mask(length, its_keys.shape[2], sliding_window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                queries[index],
                its_keys,
                its_values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and length > 1,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2)


def _mask(length: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """(length, keys), true where a query sees a key; None: SDPA's own causal mask says it."""
    ahead = keys - length
    windowed = sliding_window is not None and keys > sliding_window
    if not ahead and not windowed:
        return None
    # token i of the segment sees all before the segment, and i + 1 of its own
    mask = torch.ones(length, keys, dtype=torch.bool, device=device).tril(ahead)
    if sliding_window is not None:  # of these, the last ones
        mask = mask.triu(ahead - sliding_window + 1)
    return mask


def seen_by(segments: Sequence[Segment]) -> list[tuple[int, list[int]]]:
    """Each segment's length, and the numbers of those before it in its rows."""
    at = {segment.start: index for index, segment in enumerate(segments)}
    return [(segment.length, [at[part.start] for part in segment.before]) for segment in segments]


def table_of(segments: Sequence[Segment]) -> Tensor:
    """The same as a tensor on the CPU: of each segment its length, how many are before it, and their numbers."""
    numbers = [(length, len(before), *before) for length, before in seen_by(segments)]
    return torch.tensor([number for row in numbers for number in row])


def _read(table: Tensor) -> list[tuple[int, list[int]]]:
    numbers, seen = iter(table.tolist()), []
    for length in numbers:
        count = next(numbers)
        seen.append((length, [next(numbers) for _ in range(count)]))
    return seen


@torch.library.custom_op("finetune_kit::attend_by_segment", mutates_args=())
def attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, sliding_window: int
) -> Tensor:
    """`by_segment` as one operation, which a compiler takes for any number of segments."""
    return by_segment(query, key, value, _read(table), scaling, sliding_window).contiguous()


@attend_by_segment.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, sliding_window: int) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("finetune_kit::attend_by_segment_backward", mutates_args=())
def _backward(
    by: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, sliding_window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at queries, keys and values, from scores that are computed again."""
    seen, groups = _read(table), query.shape[1] // key.shape[1]
    ends = torch.tensor([0, *(length for length, _ in seen)]).cumsum(0).tolist()
    by_query, by_key, by_value = (torch.zeros_like(states, dtype=torch.float32) for states in (query, key, value))
    for index, (length, before) in enumerate(seen):
        own = slice(ends[index], ends[index + 1])
        parts = [slice(ends[part], ends[part + 1]) for part in (*before, index)]
        queries, gradient = query[:, :, own].float(), by[:, :, own].float()
        keys, values = (
            torch.cat([states[:, :, part] for part in parts], dim=2).float().repeat_interleave(groups, dim=1)
            for states in (key, value)
        )
        hidden = ~torch.ones(length, keys.shape[2], dtype=torch.bool, device=query.device).tril(keys.shape[2] - length)
        if (mask := _mask(length, keys.shape[2], sliding_window, query.device)) is not None:
            hidden = ~mask
        probs = (queries @ keys.mT * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        by_probs = gradient @ values.mT
        by_scores = probs * (by_probs - (by_probs * probs).sum(-1, keepdim=True)) * scaling
        by_query[:, :, own] = by_scores @ keys
        for into, found in ((by_key, by_scores.mT @ queries), (by_value, probs.mT @ gradient)):
            found = found.unflatten(1, (key.shape[1], groups)).sum(2)
            for part, gradients in zip(parts, found.split([p.stop - p.start for p in parts], dim=2), strict=True):
                into[:, :, part] += gradients
    return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype)


@_backward.register_fake
def _(
    by: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float, sliding_window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value))  # type: ignore[return-value]  # three


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *states, scaling, sliding_window = inputs
    ctx.save_for_backward(*states)
    ctx.scaling, ctx.sliding_window = scaling, sliding_window


def _give_back(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.finetune_kit.attend_by_segment_backward(by, *ctx.saved_tensors, ctx.scaling, ctx.sliding_window)
    return (*found, None, None, None)


attend_by_segment.register_autograd(_give_back, setup_context=_keep)


@lru_cache(maxsize=1)
def _flex() -> Any:
    """Flex attention as it is meant to be called on a GPU: compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def attend_by_flex(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Flex attention with a mask of blocks made from the segments, once a batch and window; as `by_segment`."""
    assert plan.blocks is not None
    if sliding_window not in plan.blocks:
        plan.blocks[sliding_window] = block_mask(plan, query.device, sliding_window)
    attends = _flex() if query.device.type == "cuda" else _flex_eager()
    mask, shared = plan.blocks[sliding_window], query.shape[1] != key.shape[1]
    found: Tensor = attends(query, key, value, block_mask=mask, scale=scaling, enable_gqa=shared)
    return found


def _flex_eager() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def block_mask(plan: Plan, device: torch.device, sliding_window: int | None) -> Any:
    """Flex attention's mask: a query sees a key of a segment that is its own or before its own, not behind it."""
    from torch.nn.attention.flex_attention import create_block_mask

    count, tokens = len(plan.segments), len(plan.tokens)
    sees = torch.zeros(count, count, dtype=torch.bool)
    for index, (_, before) in enumerate(seen_by(plan.segments)):
        sees[index, [*before, index]] = True
    lengths = torch.tensor([segment.length for segment in plan.segments])
    of = torch.repeat_interleave(torch.arange(count), lengths)
    sees, of = (part.to(device, non_blocking=True) for part in (sees, of))
    positions, window = plan.positions, NO_WINDOW if sliding_window is None else sliding_window

    def visible(batch: Tensor, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
        back = positions[one] - positions[other]
        return sees[of[one], of[other]] & (back >= 0) & (back < window)

    return create_block_mask(visible, None, None, tokens, tokens, device=str(device))
