"""What training on preferences did to a policy: its implicit rewards, measured against the policy before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetune_kit.data.tokenise import sequences
from finetune_kit.evaluation.intervals import ALIKE, SHARE, entry
from finetune_kit.evaluation.loss import Row
from finetune_kit.settings.schema import EvaluateConfig

if TYPE_CHECKING:
    from finetune_kit.evaluation.measure import Measurement


def sides(data: Any) -> tuple[list[tuple[Row, int]], list[tuple[Row, int]]]:
    """(row, index of its record) of all held-out answers to be made likelier, and of those to be made less likely."""
    chosen: list[tuple[Row, int]] = []
    rejected: list[tuple[Row, int]] = []
    for row in data.held_out:
        for side, sample in sequences(row).items():
            disliked = side == "rejected" or row.get("label") is False
            (rejected if disliked else chosen).append((sample, row["row"]))
    return chosen, rejected


def implicit_rewards(before: Measurement, after: Measurement, beta: float) -> tuple[list[float], list[float]]:
    """beta · log(policy / reference) of the chosen and of the rejected held-out answers (nats), the model before being
    the reference (arXiv 2305.18290, equation 5); differences that rounding makes are 0."""
    sides = []
    for was, now, tokens in (
        (before.nll, after.nll, before.tokens),
        (before.rejected_nll, after.rejected_nll, before.rejected_tokens),
    ):
        ratios = [first - second for first, second in zip(was, now, strict=True)]
        alike = [abs(ratio) <= ALIKE * count for ratio, count in zip(ratios, tokens, strict=True)]
        sides.append([0.0 if same else beta * ratio for ratio, same in zip(ratios, alike, strict=True)])
    return sides[0], sides[1]


def entries(before: Measurement, after: Measurement, config: EvaluateConfig, beta: float) -> list[dict[str, Any]]:
    """What training did to pairs and labelled answers: accuracy and margin of the implicit reward, which is 0 before,
    the share of pairs whose chosen answer is the likelier one, the loss of the rejected answers, the KL divergence."""
    if not before.rejected_nll:
        return []
    margin_of = margins(before, after, beta)
    # a reward of 0 says nothing: half of such rows count as right
    right = [(1.0 if margin > 0 else 0.0) if margin else 0.5 for margin in margin_of]
    half, few = [0.5] * len(right), before.sources
    lines = [entry("preference_accuracy", half, right, config, higher_is_better=True, within=(-0.5, 0.5), sources=few)]
    if before.paired:
        was, now = (
            [float(bad > good) for good, bad in zip(side.nll, side.rejected_nll, strict=True)]
            for side in (before, after)
        )
        nothing = [0.0] * len(margin_of)
        lines.append(entry("reward_margin", nothing, margin_of, config, higher_is_better=True, sources=few))
        lines.append(entry("chosen_is_likelier", was, now, config, higher_is_better=True, within=SHARE, sources=few))
    lines.append(
        entry(
            "rejected_loss",
            before.rejected_nll,
            after.rejected_nll,
            config,
            weights=before.rejected_tokens,
            alike=ALIKE,
            higher_is_better=None,
            sources=few,
        )
    )
    if before.log_probs is not None and after.log_probs is not None:
        kl, weights = _kl(before, after)
        nothing = [0.0] * len(kl)
        lines.append(entry("kl_to_reference", nothing, kl, config, weights=weights, alike=ALIKE, higher_is_better=None))
    return lines


def _kl(before: Measurement, after: Measurement) -> tuple[list[float], list[int]]:
    """KL(after || before) in nats, summed over the positions of each row, and how many those are."""
    counts = [len(places) for _, places in before.positions]
    assert before.log_probs is not None
    assert after.log_probs is not None
    rows = zip(before.log_probs.split_with_sizes(counts), after.log_probs.split_with_sizes(counts), strict=True)
    # never below 0 but by rounding
    return [max(0.0, float((now.exp() * (now - was)).double().sum())) for was, now in rows], counts


def margins(before: Measurement, after: Measurement, beta: float = 1.0) -> list[float]:
    """Implicit reward of the chosen answer minus that of the rejected one, of each held-out pair; of labelled answers
    each one's own, turned round for the disliked ones, which come last."""
    chosen, rejected = implicit_rewards(before, after, beta)
    if before.paired:
        return [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    return [*chosen, *(-reward for reward in rejected)]


def scores(before: Measurement, after: Measurement, beta: float) -> dict[str, float]:
    """The sigmoid loss of DPO on the held-out pairs (arXiv 2305.18290, equation 7), and the preference accuracy."""
    found = margins(before, after, beta)
    return {
        "loss": math.fsum(_softplus(-margin) for margin in found) / len(found),
        "preference_accuracy": sum(0.5 if margin == 0 else float(margin > 0) for margin in found) / len(found),
    }


def _softplus(number: float) -> float:
    """log(1 + exp(number)) without overflow."""
    return max(number, 0.0) + math.log1p(math.exp(-abs(number)))
