"""Token-weighted loss: the negative log-likelihood of every row and the number of tokens it is summed over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.errors import NumericsError
from finetune_kit.models.inference import evaluation_mode, in_batches
from finetune_kit.models.shapes import positions_of
from finetune_kit.packing.forward import acts_on

IGNORED = -100  # label of a token that is not trained
LOGITS = 2**26  # most logits of one forward pass: 256 MiB in float32
STRETCHES = 5  # of each paragraph of the general text: 35 in all, so that there are enough of them for a verdict
GENERAL_TEXT = Path(__file__).with_name("general_text.txt")

Row = tuple[Sequence[int], Sequence[int]]  # input_ids, labels


def row_losses(
    model: Any,
    rows: Sequence[Row],
    where: Sequence[str],
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """For each row its summed negative log-likelihood (nats) and its number of supervised tokens.

    Supervised: label not -100, first position aside, which nothing predicts. The loss of the rows together is
    sum(nll) / sum(tokens); it does not depend on batch_size, unlike a mean of batch means. Rows are padded on the
    right. Where there are several processes each scores a share of the rows, and `progress` is told of its own. Raises
    NumericsError naming the row (by `where`) whose loss is not finite.
    """
    sums = _losses(model, rows, where, batch_size, lambda losses: [math.fsum(losses)], progress)
    return [sum(total) for total in sums], [len(places) for places in _positions(rows)]


def general_losses(model: Any, tokenizer: Any, batch_size: int) -> tuple[list[float], list[int]]:
    """The same of the fixed general text, each of its paragraphs in STRETCHES of about equal length. A paragraph is one
    row of the model's, so that a stretch is predicted from all of its paragraph before it. Where the model's positions
    end, the paragraph does."""
    room = positions_of(model)  # None: no end
    rows = [(ids[:room], labels[:room]) for ids, labels in general_rows(tokenizer)]
    where = [f"general text, paragraph {number}" for number in range(1, len(rows) + 1)]
    nll, tokens = [], []
    for losses in _losses(model, rows, where, batch_size, list):
        edges = [len(losses) * part // STRETCHES for part in range(STRETCHES + 1)]
        for begin, end in itertools.pairwise(edges):
            nll.append(math.fsum(losses[begin:end]))
            tokens.append(end - begin)
    return nll, tokens


def _positions(rows: Sequence[Row]) -> list[list[int]]:
    """Of each row the places in front of its supervised tokens."""
    return [[at - 1 for at in range(1, len(labels)) if labels[at] != IGNORED] for _, labels in rows]


def _losses(
    model: Any,
    rows: Sequence[Row],
    where: Sequence[str],
    batch_size: int,
    keep: Callable[[list[float]], list[float]],
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """What `keep` makes of each row's negative log-likelihoods, one a supervised token; [] for a row without any."""
    kept: list[list[float]] = [[] for _ in rows]
    positions = _positions(rows)
    done = 0

    def score(batch: list[int]) -> None:
        nonlocal done
        for index, losses in zip(batch, _batch_losses(model, rows, positions, batch), strict=True):
            if not math.isfinite(value := sum(losses)):
                raise NumericsError(
                    f"{where[index]}: the model's loss is {value}.",
                    "The weights or the arithmetic broke: try model.dtype=float32 or a smaller train.learning_rate.",
                )
            kept[index] = keep(losses)
        done += len(batch)
        if progress is not None:
            progress(done)

    def share(mine: list[int]) -> list[list[float]]:
        in_batches(_plan(model, rows, positions, batch_size, mine), score, "scoring held-out rows")
        return [kept[index] for index in mine]

    if progress is not None:
        progress(0)
    with evaluation_mode(model):
        return distributed.spread(len(rows), share, distributed.is_sharded(model))


def _plan(
    model: Any, rows: Sequence[Row], positions: list[list[int]], batch_size: int, mine: Sequence[int]
) -> list[list[int]]:
    """Batches of row indices, the largest first, within batch_size rows and LOGITS logits. Of `mine`, those to score.

    Padded, a batch has rows about as long, and the head runs on all of them wherever one has a label. Packed, it has
    rows that begin alike, whose beginning is computed once, and the head runs in front of labels.
    """
    vocabulary, packed = model.config.get_text_config().vocab_size, acts_on(model)
    batches: list[list[int]] = []

    def fits(batch: list[int]) -> bool:
        places = [positions[index] for index in batch]
        head = sum(map(len, places)) if packed else len(batch) * len(set().union(*places))
        return len(batch) <= batch_size and head * vocabulary <= LOGITS

    scored = (index for index in mine if positions[index])
    for index in sorted(scored, key=lambda index: (0 if packed else -len(rows[index][0]), list(rows[index][0]))):
        if batches and fits([*batches[-1], index]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return sorted(batches, key=lambda batch: -sum(len(rows[index][0]) for index in batch))


def _batch_losses(model: Any, rows: Sequence[Row], positions: list[list[int]], batch: list[int]) -> list[list[float]]:
    import torch
    from torch.nn.functional import cross_entropy

    width = max(len(rows[index][0]) for index in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for line, index in enumerate(batch):
        ids = rows[index][0]
        input_ids[line, : len(ids)] = torch.as_tensor(ids)
        attention_mask[line, : len(ids)] = 1
    # The head runs only where a row has a label (padded: where some row of the batch has one): on prompts it would be
    # most of the work.
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    for line, index in enumerate(batch):
        wanted[line, positions[index]] = True
    kept = wanted.any(dim=0).nonzero()[:, 0]
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        logits_to_keep=(wanted if acts_on(model) else kept).to(model.device),
        use_cache=False,
    ).logits
    if len(logits) == len(batch):  # padded, or one row, for which it is the same
        if logits.shape[1] != len(kept):  # a model that knows no logits_to_keep gives them all
            logits = logits[:, kept.to(logits.device)]
        each = (row[own] for row, own in zip(logits, wanted[:, kept].to(logits.device), strict=True))
    else:
        each = (own for own in logits[0].split([len(positions[index]) for index in batch]))
    found: list[list[float]] = []
    for index, own in zip(batch, each, strict=True):
        targets = torch.tensor([rows[index][1][at + 1] for at in positions[index]], device=own.device)
        found.append(cross_entropy(own.float(), targets, reduction="none").tolist())
    return found


def general_rows(tokenizer: Any) -> list[Row]:
    """The paragraphs of the fixed general text, every token supervised. All models see the same words."""
    paragraphs = GENERAL_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    rows = [tokenizer(paragraph)["input_ids"] for paragraph in paragraphs]
    return [(ids, ids) for ids in rows]
