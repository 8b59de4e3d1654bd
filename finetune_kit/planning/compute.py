"""What pretraining takes: tokens, tokens a parameter, floating-point operations, and hours at the device's own rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from finetune_kit.data.load import Data
from finetune_kit.models.device import PLANNED, computes_in_bfloat16, device

OPTIMAL = 20  # tokens a parameter that make the best of a given compute (Hoffmann et al. 2022, arXiv 2203.15556)
PRODUCTS, LARGEST = 7, 2048  # timed products, and the most rows of one


def compute(data: Data, policy: Any, planned: dict[str, int]) -> dict[str, float | None]:
    """Of a run that trains all weights of an empty policy on text; `planned`: its steps and rows.

    tokens: that go through the model, each epoch counted. flops: of forward and backward pass, 6 for each weight in a
    matrix product and token, and those of attention over the tokens before. flops_a_second: of a matrix product of the
    model's shapes on this device, timed now; None where the plan is for another one. hours: at that rate, which no
    training reaches: the least that it can take.
    """
    epochs = planned["steps"] * planned["rows_in_a_step"] / planned["rows_in_an_epoch"]
    tokens = data.ledger.train.tokens * epochs
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    flops = tokens * flops_a_token(policy, data.ledger.train.tokens / max(1, data.ledger.train.samples))
    rate = None if PLANNED.get() is not None else flops_a_second(policy)
    return {
        "tokens": tokens,
        "epochs": epochs,
        "tokens_a_parameter": tokens / parameters,
        "compute_optimal_tokens": float(OPTIMAL * parameters),
        "flops": flops,
        "flops_a_second": rate,
        "hours": None if rate is None else flops / rate / 3600,
    }


def flops_a_token(policy: Any, row: float) -> float:
    """Of forward and backward pass for a token in rows of `row` tokens. Embeddings are looked up, not multiplied."""
    text = policy.config.get_text_config()
    words, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    weights = sum(weight.numel() for weight in policy.parameters() if weight.dim() > 1 and weight is not words)
    weights += words.numel() if head is words else 0
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    # queries with keys and weights with values: 2 products of `width` for each of row / 2 tokens before, 6 each
    return float(6 * weights + 6 * text.num_hidden_layers * width * row)


def flops_a_second(policy: Any) -> float:
    """Of one product of tokens with the MLP's matrix, in the type that training computes in: the fastest of several."""
    import torch

    text = policy.config.get_text_config()
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    dtype, place = torch.bfloat16 if computes_in_bfloat16() else torch.float32, device()
    one, other = (torch.ones(shape, device=place, dtype=dtype) for shape in ((LARGEST, width), (width, inner)))
    seconds = []
    for _ in range(PRODUCTS):
        begin = time.perf_counter()
        (one @ other)[0, 0].item()  # which waits for the device
        seconds.append(time.perf_counter() - begin)
    return float(2 * LARGEST * width * inner / min(seconds))


def compute_in_words(planned: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of the plan's table; none for a run that is not a pretraining."""
    if "compute" not in planned:
        return
    known = planned["compute"]
    yield (
        "tokens",
        f"{known['tokens']:,.0f} in {known['epochs']:.1f} epochs: {known['tokens_a_parameter']:.1f} a parameter; "
        f"compute-optimal are about {OPTIMAL}: {known['compute_optimal_tokens']:,.0f}",
    )
    rate, hours = known["flops_a_second"], known["hours"]
    at = f"; at least {_time(hours)} at {rate / 1e9:,.0f} GFLOP/s, timed here" if rate else ""
    yield "compute", f"{known['flops']:.1e} FLOPs{at}"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
