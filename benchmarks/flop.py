"""Floating-point operations of a training step by formula, since torch cannot count them on a GPU.

torch's FlopCounterMode knows neither `addmm(out_dtype=…)`, which TRL's head calls on CUDA, nor varlen attention with
fewer key heads. So the work that a step is for is counted instead, alike for all sides: real tokens through the layers,
the head where a label is, attention of each row to itself. What a side computes besides (padding, logits that no label
wants, a second forward pass for gradient checkpointing) is its loss, and what it saves (beginnings that rows share) its
gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def step_flop(model: Any, lengths: Sequence[int], labels: int) -> int:
    """Of one forward and backward pass over rows of `lengths` real tokens with `labels` labels in all."""
    return products(model, sum(lengths), labels) + attention(model, lengths)


def products(model: Any, tokens: int, labels: int) -> int:
    """Of the matrix products: for each weight and token 2 forward, 2 for the input's gradient, 2 for its own where it
    is trained. Weights of the head count for labels, embeddings for nothing."""
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    of_head = set() if head is None else {id(part) for part in head.modules()}
    total = 0
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        size = module.in_features * module.out_features
        times = 6 if module.weight.requires_grad else 4
        total += times * size * (labels if id(module) in of_head else tokens)
    return total


def attention(model: Any, lengths: Sequence[int]) -> int:
    """Of the attention of each row's tokens to those up to themselves: two products forward and four backward."""
    shape = model.config.get_text_config()
    wide = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 3 * 2 * 2 * pairs * shape.num_attention_heads * wide * shape.num_hidden_layers
