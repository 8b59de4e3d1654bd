"""How far two models' next-token distributions are apart: exact KL at some supervised positions.

Of the first model only its log-probabilities are kept, so that one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_kit.errors import NumericsError
from finetune_kit.evaluation.loss import IGNORED, Row
from finetune_kit.models.inference import evaluation_mode

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Positions = list[tuple[list[int], list[int]]]  # rows of (token ids, positions whose next token is supervised)

ROWS = 64  # rows that the KL is taken over, spread evenly
POSITIONS = 512  # positions in those rows, spread evenly
LOG_PROBS = 2**26  # most log-probabilities kept: 256 MiB in float32


def choose_positions(rows: Sequence[Row], vocabulary: int) -> Positions:
    """At most POSITIONS supervised positions in at most ROWS rows, both spread evenly; fewer where the vocabulary is so
    large that their log-probabilities would be more than LOG_PROBS numbers."""
    some = _spread([row for row in rows if any(label != IGNORED for label in row[1][1:])], ROWS)
    places = [
        (index, at - 1)
        for index, (_, labels) in enumerate(some)
        for at in range(1, len(labels))
        if labels[at] != IGNORED
    ]
    chosen: dict[int, list[int]] = {}
    for index, at in _spread(places, min(POSITIONS, max(1, LOG_PROBS // vocabulary))):
        chosen.setdefault(index, []).append(at)
    return [(list(some[index][0][: positions[-1] + 1]), positions) for index, positions in chosen.items()]


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at even distances, or all of them."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def log_probs(model: Any, rows: Positions) -> Iterator[torch.Tensor]:
    """For each row the log-probabilities (positions, vocabulary) of the next token, float32 on the CPU."""
    import torch

    with evaluation_mode(model):
        for ids, positions in rows:
            kept = torch.tensor(positions, device=model.device)
            logits = model(torch.tensor([ids], device=model.device), logits_to_keep=kept, use_cache=False).logits[0]
            if len(logits) != len(kept):  # a model that knows no logits_to_keep gives them all
                logits = logits[kept]
            yield logits.float().log_softmax(-1).cpu()


def divergence(model: Any, rows: Positions, first: torch.Tensor) -> dict[str, float]:
    """KL(first || model) in nats: mean over the positions and largest; and the share that has the same top token."""
    import torch

    wanted = first.split_with_sizes([len(positions) for _, positions in rows])
    kl, same = [], []
    for ours, theirs in zip(log_probs(model, rows), wanted, strict=True):
        # never below 0 but by rounding
        kl.append((theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64).clamp_min(0))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    every = torch.cat(kl)
    if not every.isfinite().all():
        raise NumericsError("The model's probabilities are not finite.", "Look at the run's weights and report.")
    shares = torch.cat(same).double().mean()
    return {"kl_per_token": float(every.mean()), "kl_largest": float(every.max()), "same_top_token": float(shares)}
