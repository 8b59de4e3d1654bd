"""Is a reward model good enough to train against? Its scores on held-out pairs, and what else could explain them.

A score means something only as a difference between answers to one prompt: p(chosen beats rejected) = sigmoid(r(chosen)
- r(rejected)) (Bradley and Terry 1952).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.records import prompt_of, reference_of
from finetune_kit.data.split import FEWEST, source_rows
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.evaluation.compare import Report
from finetune_kit.evaluation.intervals import ALIKE, SHARE, agreeing_interval, entry
from finetune_kit.evaluation.measure import Progress
from finetune_kit.models.inference import evaluation_mode
from finetune_kit.models.reward import score_batch, score_rows
from finetune_kit.settings.schema import EvaluateConfig
from finetune_kit.system.terminal import doing

CHECKED = 32  # pairs that are scored again, turned round and without their end tokens
BINS = 10  # of the reliability plot, between a win probability of 0.5 and 1
MISTAKES = 5  # pairs shown on which the model is most surely wrong
UNMOVED = 1e-6  # a score that changes less than this share of the scores' spread did not see the token
Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass
class Rewards:
    """Scores of the held-out pairs, one entry a pair in the order of the data.

    `lengths`: tokens of the answers. `turned`: scores of the first pairs, each with its partner in a batch of two,
    chosen first and rejected first: (chosen, rejected, chosen, rejected). `endless`: scores (chosen, rejected) of the
    same pairs without their end tokens.
    """

    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    turned: list[tuple[float, float, float, float]] = field(default_factory=list)
    endless: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def differences(self) -> list[float]:
        """r(chosen) - r(rejected)."""
        return [good - bad for good, bad in zip(self.chosen, self.rejected, strict=True)]


def measure_rewards(
    model: Any, tokenizer: Any, data: Any, config: EvaluateConfig, progress: Progress | None = None
) -> Rewards:
    """Score all held-out pairs of `data`, and the first ones again in other company and without their end tokens.

    The model's mode is left as it was. Raises SettingsError (a metric of answers: there are none), DataError (no
    held-out pair), NumericsError (a score that is not a number, with its row), ResourceError (memory).
    """
    named = ", ".join([*config.metrics, *config.hub_metrics, *filter(None, [config.reward_model])])
    if named:
        raise SettingsError(
            f"evaluate.metrics ({named}) has no effect: a reward model writes no answers.", "Leave it out."
        )
    started = time.perf_counter()
    pairs = list(_pairs(data.held_out))
    if not pairs:
        raise DataError("There is no held-out pair to measure on.", "Set data.held_out_size to 100 or more.")
    measured = Rewards(where=[data.held_out_records[row].where for _, _, _, row in pairs])
    flat = [ids for chosen, rejected, _, _ in pairs for ids in (chosen, rejected)]
    told = (
        None
        if progress is None
        else lambda done: progress("held-out answers", min(done * distributed.count(), len(flat)), len(flat))
    )
    with doing("scoring held-out answers"):
        scores = _scores(model, flat, config.batch_size, told)
    for index, number in enumerate(scores):
        if not math.isfinite(number):
            raise NumericsError(
                f"{measured.where[index // 2]}: the model's score is {number}.",
                "The weights or the arithmetic broke: try model.dtype=float32 or a smaller train.learning_rate.",
            )
    measured.chosen, measured.rejected = scores[0::2], scores[1::2]
    measured.lengths = [(len(chosen) - prompt, len(rejected) - prompt) for chosen, rejected, prompt, _ in pairs]
    checked = pairs[:CHECKED]
    with doing("scoring some again, turned round and without their ends"):
        with evaluation_mode(model):
            for chosen, rejected, _, _ in checked:
                there, back = score_batch(model, [chosen, rejected]), score_batch(model, [rejected, chosen])
                measured.turned.append((*there, *reversed(back)))  # type: ignore[arg-type]  # four of them
        endless = score_rows(
            model, [ids[:-1] for chosen, rejected, _, _ in checked for ids in (chosen, rejected)], config.batch_size
        )
    measured.endless = list(zip(endless[0::2], endless[1::2], strict=True))
    measured.seconds = time.perf_counter() - started
    return measured


def held_out_rewards(
    model: Any, tokenizer: Any, data: Any, config: EvaluateConfig, metric: str = "loss"
) -> dict[str, float]:
    """{"loss", "preference_accuracy"} on all held-out pairs: what a run is watched by."""
    pairs = list(_pairs(data.held_out))
    if not pairs:
        raise DataError("There is no held-out pair to measure on.", "Set data.held_out_size to 100 or more.")
    scores = _scores(model, [ids for chosen, rejected, _, _ in pairs for ids in (chosen, rejected)], config.batch_size)
    differences = [good - bad for good, bad in zip(scores[0::2], scores[1::2], strict=True)]
    return {"loss": _mean(pair_losses(differences)), "preference_accuracy": _mean(rights(differences))}


def _scores(
    model: Any, rows: Sequence[list[int]], batch_size: int, told: Callable[[int], None] | None = None
) -> list[float]:
    """The scores of rows, each process scoring a share of them."""

    def share(mine: list[int]) -> list[float]:
        return score_rows(model, [rows[index] for index in mine], batch_size, told)

    return distributed.spread(len(rows), share, distributed.is_sharded(model))


def _pairs(rows: Any) -> Iterator[tuple[list[int], list[int], int, int]]:
    """(chosen, rejected, tokens of their prompt, row) of every pair; both sides are whole sequences."""
    for row in rows:
        sides = sequences(row)
        yield sides["chosen"][0], sides["rejected"][0], len(row["prompt_ids"]), row["row"]


def pair_losses(differences: Sequence[float]) -> list[float]:
    """- log sigmoid(difference) in nats; ln 2 where both scores are equal."""
    return [max(-number, 0.0) + math.log1p(math.exp(-abs(number))) for number in differences]


def rights(differences: Sequence[float]) -> list[float]:
    """1 where the chosen answer is preferred, 0 where the rejected one is, and a half for a tie."""
    return [0.5 if number == 0 else float(number > 0) for number in differences]


def share_interval(values: Sequence[float]) -> list[float]:
    """95 % interval of the mean of values from 0 to 1, by Wilson's score (JASA 22, 1927), and Clopper and Pearson's
    where all rows agree: never outside 0 to 1, and never of width 0."""
    if min(values) == max(values):
        return agreeing_interval(values[0], len(values), 0.0, 1.0)
    n, share = len(values), _mean(values)
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def length_rule(train: Sequence[tuple[int, int]], held_out: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What preferring the longer (or always the shorter) answer gets; which of the two, the training pairs decide.

    Pairs are (tokens of the chosen, tokens of the rejected answer); equal lengths count a half.
    """
    longer = _mean(rights([chosen - rejected for chosen, rejected in train]))
    sign, rule = (1, "longer") if longer >= 0.5 else (-1, "shorter")
    right = rights([sign * (chosen - rejected) for chosen, rejected in held_out])
    return {
        "rule": f"the {rule} answer wins",
        "train_accuracy": max(longer, 1 - longer),
        "accuracy": _mean(right),
        "interval": share_interval(right),
    }


def calibration(differences: Sequence[float]) -> dict[str, Any]:
    """How sure the model is, against how often it is right.

    A pair's confidence is the win probability of the answer that the model prefers, 0.5 to 1. `bins`: those that hold
    pairs, with mean confidence and accuracy. `error`: the mean distance of the two, weighted by pairs (expected
    calibration error; Guo et al. 2017, arXiv 1706.04599).
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for number, right in zip(differences, rights(differences), strict=True):
        confidence = 1 / (1 + math.exp(-min(abs(number), 700.0)))
        bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((confidence, right))
    told: list[dict[str, Any]] = [
        {
            "confidence": _mean([confidence for confidence, _ in members]),
            "accuracy": _mean([right for _, right in members]),
            "interval": share_interval([right for _, right in members]),
            "pairs": len(members),
        }
        for members in bins
        if members
    ]
    error = sum(item["pairs"] * abs(item["confidence"] - item["accuracy"]) for item in told) / len(differences)
    confidence = sum(item["pairs"] * item["confidence"] for item in told) / len(differences)
    return {"error": error, "mean_confidence": confidence, "bins": told}


def accuracy_by_margin(differences: Sequence[float], margins: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy of the pairs with the smallest, middle and largest margins of the labels; [] where none is known."""
    known = sorted(
        (margin, right) for margin, right in zip(margins, rights(differences), strict=True) if not math.isnan(margin)
    )
    if not known:
        return []
    edges = sorted({known[0][0], *(known[len(known) * third // 3][0] for third in (1, 2))})
    found = []
    for edge, above in zip(edges, [*edges[1:], math.inf], strict=True):
        members = [(margin, right) for margin, right in known if edge <= margin < above]
        right = [value for _, value in members]
        facts = {"from": members[0][0], "to": members[-1][0], "pairs": len(members)}
        found.append({**facts, "accuracy": _mean(right), "interval": share_interval(right)})
    return found


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's r; None where one of the two does not vary."""
    mean, mean_of_other = _mean(one), _mean(other)
    moved = [(a - mean, b - mean_of_other) for a, b in zip(one, other, strict=True)]
    sizes = math.sqrt(sum(a * a for a, _ in moved)), math.sqrt(sum(b * b for _, b in moved))
    return sum(a * b for a, b in moved) / (sizes[0] * sizes[1]) if min(sizes) > 0 else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def compare_rewards(before: Rewards, after: Rewards, data: Any, config: EvaluateConfig) -> Report:
    """The report of a reward model, with its gate: passed, accuracy, interval, length_rule_accuracy and reason.

    It passes where the lower end of the accuracy's 95 % interval is above 0.5 and above what a length-only rule gets
    on the same pairs, longer or shorter, whichever is better on them.
    """
    if before.where != after.where:
        raise ValueError("before and after were not measured on the same pairs")
    was, now = rights(before.differences), rights(after.differences)
    few = source_rows(after.where)
    losses = pair_losses(before.differences), pair_losses(after.differences)
    entries = [
        entry("preference_accuracy", was, now, config, higher_is_better=True, within=SHARE, sources=few),
        entry("pair_loss", *losses, config, alike=ALIKE, sources=few),
        entry("reward_margin", before.differences, after.differences, config, higher_is_better=True, sources=few),
    ]
    details = _details(after, data)
    gains = [late - early for early, late in zip(was, now, strict=True)]
    return Report(
        metrics=entries,
        main=entries[0]["name"],
        verdict=_sentence(details, entries[0]),
        improved=entries[0]["verdict"] == "better",
        wins=sum(gain > 0 for gain in gains),
        ties=sum(gain == 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
        rows={"held_out": len(now), "answered": 0},
        samples=[],
        decoding={},
        seconds={"before": before.seconds, "after": after.seconds},
        details=details,
    )


def _details(after: Rewards, data: Any) -> dict[str, Any]:
    differences = after.differences
    answered = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in data.train]
    rule = length_rule(answered, after.lengths)
    scores = [*after.chosen, *after.rejected]
    lengths = [float(chosen) for chosen, _ in after.lengths] + [float(rejected) for _, rejected in after.lengths]
    longer = [float(chosen - rejected) for chosen, rejected in after.lengths]
    return {
        # a score may follow length either way round, whatever the training pairs would have had it do
        "gate": gate(differences, max(rule["accuracy"], 1 - rule["accuracy"]), source_rows(after.where)),
        "length_rule": rule,
        "length_correlation": {
            "reward_and_length": correlation(scores, lengths),
            "differences_within_pairs": correlation(differences, longer),
        },
        "calibration": calibration(differences),
        "accuracy_by_margin": accuracy_by_margin(differences, [float(row["margin"]) for row in data.held_out]),
        "scores": _spread(scores),
        "turned_round": _turned(after),
        "end_token": _end_token(after),
        "mistakes": _mistakes(after, data),
    }


def gate(differences: Sequence[float], length_rule_accuracy: float, sources: int = 0) -> dict[str, Any]:
    """Whether the scores are better than chance and than judging by length, as PPO reads it. `sources`: how many rows
    of the data the pairs are made from, where those are fewer."""
    right = rights(differences)
    accuracy, interval = _mean(right), share_interval(right)
    found = (
        f"accuracy {accuracy:.3f} on {len(right)} held-out pairs, 95 % interval {interval[0]:.3f} to {interval[1]:.3f}"
    )
    facts = {"accuracy": accuracy, "interval": interval, "length_rule_accuracy": length_rule_accuracy}
    if min(len(right), sources or len(right)) < FEWEST:
        of = f" of {sources} rows" if 0 < sources < len(right) else ""
        reason = f"{found}{of}: too few to judge, {FEWEST} {'rows' if of else 'pairs'} are needed"
        return {"passed": False, **facts, "reason": reason}
    against = []
    if not interval[0] > 0.5:
        against.append("0.5, which is chance")
    if not interval[0] > length_rule_accuracy:
        against.append(f"{length_rule_accuracy:.3f}, which a length-only rule gets")
    reason = f"{found}: " + (
        f"its lower end is not above {' nor above '.join(against)}"
        if against
        else f"its lower end is above chance and above the {length_rule_accuracy:.3f} of a length-only rule"
    )
    return {"passed": not against, **facts, "reason": reason}


def _spread(scores: Sequence[float]) -> dict[str, float]:
    mean, ordered = _mean(scores), sorted(scores)
    return {
        "mean": mean,
        "standard_deviation": math.sqrt(_mean([(score - mean) ** 2 for score in scores])),
        "lowest": ordered[0],
        "highest": ordered[-1],
    }


def _turned(after: Rewards) -> dict[str, Any]:
    """Whether a score depends on the answer beside it: the same pair with the chosen one first, and with it last."""
    moved, same, count = 0.0, 0, len(after.turned)
    pairs = zip(after.turned, after.chosen[:count], after.rejected[:count], strict=True)
    for (good, bad, good_again, bad_again), chosen, rejected in pairs:
        moved = max(moved, *(abs(score - chosen) for score in (good, good_again)))
        moved = max(moved, *(abs(score - rejected) for score in (bad, bad_again)))
        same += rights([good - bad]) == rights([good_again - bad_again])
    return {"pairs": count, "agreement": same / count, "largest_difference": moved}


def _end_token(after: Rewards) -> dict[str, Any]:
    """What the end token does to the score: mean of (score with it - score without it), and whether it is seen."""
    whole = [score for pair in zip(after.chosen, after.rejected, strict=True) for score in pair]
    cut = [score for pair in after.endless for score in pair]
    moved = [score - without for score, without in zip(whole[: len(cut)], cut, strict=True)]
    spread = _spread([*after.chosen, *after.rejected])["standard_deviation"]
    return {
        "answers": len(moved),
        "mean_difference": _mean(moved),
        "share_higher_with_it": _mean([float(number > 0) for number in moved]),
        "seen": max(map(abs, moved)) > UNMOVED * spread,
    }


def _mistakes(after: Rewards, data: Any) -> list[dict[str, Any]]:
    """The pairs on which the model is most surely wrong."""
    worst = sorted((number, index) for index, number in enumerate(after.differences) if number < 0)[:MISTAKES]
    rows = list(data.held_out["row"])
    found = []
    for _, index in worst:
        record = data.held_out_records[rows[index]]
        turns = prompt_of(record)
        found.append(
            {
                "where": after.where[index],
                "prompt": str(turns[-1]["content"]) if turns else "",
                "chosen": reference_of(record),
                "rejected": str(record.rejected[-1]["content"]),
                "scores": [after.chosen[index], after.rejected[index]],
            }
        )
    return found


def _sentence(details: dict[str, Any], main: dict[str, Any]) -> str:
    """The verdict in words: the gate first, then what a user of the scores should know."""
    passed, sure, ends = details["gate"]["passed"], details["calibration"], details["end_token"]
    opening = f"{'Good' if passed else 'Not good'} enough for PPO"
    if main["verdict"].startswith("too few"):
        opening = main["verdict"].capitalize()
    text = f"{opening}: {details['gate']['reason']}."
    by_length = details["length_correlation"]["differences_within_pairs"]
    if by_length is not None and abs(by_length) > 0.5:
        text += f" It goes by length: rewards and lengths within pairs correlate by {by_length:+.2f}."
    right, (low, high) = details["gate"]["accuracy"], details["gate"]["interval"]
    if not low <= sure["mean_confidence"] <= high:
        side = "too sure of itself" if sure["mean_confidence"] > right else "less sure of itself than it could be"
        text += f" It is {side}: mean win probability {sure['mean_confidence']:.2f}, right in {right:.2f} of the pairs."
    if not ends["seen"]:
        text += " It cannot reward ending: the score does not change when the end token is left out."
    if details["turned_round"]["agreement"] < 1:
        text += f" Turned round, only {details['turned_round']['agreement']:.2f} of the pairs keep their preference."
    return text
