"""What torch's varlen attention is to compute, in plain torch and float32: the stand-in for its kernel on a CPU."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """query (all queries, heads, d), key and value (all keys, key heads, d); int32 lengths, cumulative.

    Query i of q sees, of its k keys, those from i + k - q - window_size[0] to i + k - q + window_size[1]; -1 is no end.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.shape == cu_seq_k.shape
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert (len(query), len(key)) == (int(cu_seq_q[-1]), int(cu_seq_k[-1]))
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert isinstance(max_q, int)
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for own, seen in zip(query.split(cu_seq_q.diff().tolist()), zip_split(key, value, cu_seq_k), strict=True):
        keys, values = (states.float().repeat_interleave(groups, dim=1) for states in seen)
        scores = torch.einsum("qhd,khd->hqk", own.float(), keys) * (scale or own.shape[-1] ** -0.5)
        ahead = len(keys) - len(own)
        distance = torch.arange(len(keys)) - torch.arange(len(own))[:, None] - ahead  # of a key from its query's own
        left, right = (len(keys) if end == -1 else end for end in window_size)
        scores = scores.masked_fill((distance < -left) | (distance > right), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs).to(query.dtype)


def zip_split(key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> Any:
    sizes = lengths.diff().tolist()
    return zip(key.split(sizes), value.split(sizes), strict=True)


def torch_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> torch.Tensor:
    """As torch 2.10 has it: causal or not, no window and no scale; fewer key heads without being told."""
    window = (-1, 0) if is_causal else (-1, -1)
    given = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return reference(*given, window_size=window, enable_gqa=True)


def torch_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """As torch 2.11 has it: fewer key heads without being told."""
    given = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return reference(*given, scale=scale, window_size=window_size, enable_gqa=True)


def torch_2_12(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """As torch 2.12 and 2.13 have it."""
    assert cu_seq_k is not None
    given = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    return reference(*given, scale=scale, window_size=window_size, enable_gqa=enable_gqa)


SIGNATURES = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12}


def same_arguments() -> bool:
    """Whether the stand-in's arguments are torch's: names, order, defaults."""
    ours, torchs = (inspect.signature(function).parameters for function in (reference, varlen_attn))
    return all((torchs[name].kind, torchs[name].default) == (one.kind, one.default) for name, one in ours.items())
