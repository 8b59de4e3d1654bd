"""Before and after on the same rows with the same decoding, and whether the difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import DataError, SettingsError
from finetune_kit.evaluation import choices, fairness, function_calls, preferences, safety
from finetune_kit.evaluation.guards import choice_sources, guarded, sentence
from finetune_kit.evaluation.intervals import ALIKE, SHARE, entry
from finetune_kit.evaluation.measure import Measurement, held_out_only, measure
from finetune_kit.evaluation.metrics import BUILT_IN
from finetune_kit.evaluation.tools import tools_report, tools_sentence
from finetune_kit.settings.schema import EvaluateConfig

if TYPE_CHECKING:
    from finetune_kit.generation.toolbox import Toolbox

SAMPLES = 8  # answers kept in report.json: the first rows, whatever they show
REFUSALS = {"harmful_refused": "Harmful prompts refused", "harmless_refused": "Harmless prompts refused"}
LARGEST_EXPONENT = 700.0  # exp(710) is not a float: a model that far gone has a loss but no perplexity


@dataclass
class Report:
    """Before against after. `main` names the metric that the verdict rests on; wins, ties and losses are its rows.
    `improved`: it got better, and no guard got worse."""

    metrics: list[dict[str, Any]]  # name, before, after, difference, interval, n, higher_is_better, verdict
    main: str
    verdict: str
    improved: bool
    wins: int
    ties: int
    losses: int
    rows: dict[str, int]
    samples: list[dict[str, Any]]
    decoding: dict[str, Any]
    seconds: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)  # what a method adds to the report, under its own keys

    def unsafe(self) -> str:
        """Why the run is not known to be as safe as before, in words; "" where it is: neither are fewer harmful prompts
        refused nor more harmless ones, beyond the interval."""
        found = {line["name"]: line for line in self.metrics if line["name"] in REFUSALS}
        bad = [line for line in found.values() if line["verdict"] not in ("better", "no difference")]
        said = [
            f"{REFUSALS[line['name']]} {line['before']:.2f} → {line['after']:.2f}: {line['verdict']}" for line in bad
        ]
        return "; ".join(said) if found else "refusals were not measured: evaluate.safety is unset"

    def to_json(self) -> dict[str, Any]:
        """The content of report.json: numbers, texts, lists and dicts only, and no harmful prompt."""
        content = dict(vars(self))
        details = dict(content.pop("details"))
        if "safety" in details:
            details["safety"] = safety.without_texts(details["safety"])
        return {**details, **content}


def compare(
    before: Measurement,
    after: Measurement,
    config: EvaluateConfig,
    beta: float = 1.0,
    history: Sequence[dict[str, float]] = (),
) -> Report:
    """The differences after - before on the same rows, each with a 95 % interval from a paired bootstrap over rows.

    A metric is better or worse when the interval lies on one side of 0; "no difference" otherwise, and "too few to
    judge" below 20 rows. The main metric is
    the first score of the answers, or, where none was scored, the preference accuracy or the held-out loss. `beta`:
    of the method that trained on preferences; the model before is its reference. `history`: the lines of metrics.jsonl;
    where they have a KL from the reference, the last one is told as `kl_spent`, nats a sampled completion.
    """
    same = ("tokens", "text_bytes", "rejected_tokens", "general_tokens", "where", "references", "decoding")
    differing = [name for name in same if getattr(before, name) != getattr(after, name)]
    if differing or before.metrics.keys() != after.metrics.keys():
        raise ValueError(f"before and after were not measured on the same rows in the same way: {differing}")
    if before.safety and after.safety and before.safety.prompts != after.safety.prompts:
        raise ValueError("before and after were asked different prompts of evaluate.safety")
    entries = []
    for name, scores in before.metrics.items():
        within = SHARE if name in BUILT_IN else None  # rewards and scores of the Hub may be any numbers
        entries.append(entry(name, scores, after.metrics[name], config, higher_is_better=True, within=within))
    entries += function_calls.entries(before.called, after.called, config)
    entries += preferences.entries(before, after, config, beta)
    entries += _loss_entries("held_out", before.nll, after.nll, before.tokens, config, before.sources)
    if before.text_nll:
        was, now = ([nats / math.log(2) for nats in side.text_nll] for side in (before, after))
        entries.append(entry("held_out_bits_per_byte", was, now, config, weights=before.text_bytes, alike=ALIKE))
    entries += _loss_entries("general_text", before.general_nll, after.general_nll, before.general_tokens, config)
    if before.completions and not before.text_nll:  # continuations of texts are not answers
        was, now = ([float(completion.ended) for completion in side.completions] for side in (before, after))
        entries.append(entry("answers_ended", was, now, config, higher_is_better=True, within=SHARE))
        was, now = ([float(len(item.ids)) for item in side.completions] for side in (before, after))
        entries.append(entry("answer_tokens", was, now, config, higher_is_better=None))
    details: dict[str, Any] = {}
    if before.safety is not None and after.safety is not None:
        entries += safety.entries(before.safety, after.safety, config)
        details["safety"] = safety.details(before.safety, after.safety, config)
    names = {item.source: choices.name_of(item.source, choice_sources(config)) for item in before.choices}
    for first, then in zip(before.choices, after.choices, strict=True):
        entries += choices.entries(first, then, config, names[first.source])
    if before.choices:
        details["choices"] = choices.details(before.choices, config)
    if before.fairness is not None and after.fairness is not None:
        entries += fairness.entries(before.fairness, after.fairness, config)
        details["fairness"] = fairness.details(before.fairness, after.fairness, config)
    if not entries:
        raise DataError("Nothing was measured.", "Leave evaluate.size or evaluate.general_text as it is.")
    main = entries[0]
    wins, ties, losses = _win_tie_loss(before, after)
    guards = guarded(config, entries, names)
    verdict = _sentence(entries, wins, ties, losses) + sentence(guards)
    broken = [line["name"] for line in guards if line["verdict"] == "worse"]
    if guards:
        details["guards"] = {"held": [line["name"] for line in guards if line["name"] not in broken], "failed": broken}
    if before.called:
        details["function_calls"] = function_calls.details(before.called, after.called)
    if before.with_tools and after.with_tools:
        details["tools"] = tools_report(before, after, config)
        verdict += f" {tools_sentence(details['tools'])}"
    if spent := [line["objective/kl"] for line in history if "objective/kl" in line]:
        details["kl_spent"] = spent[-1]
        verdict += f" KL spent: {spent[-1]:.2f} nats a completion."
    return Report(
        metrics=entries,
        main=main["name"],
        verdict=verdict,
        improved=main["verdict"] == "better" and not broken,
        wins=wins,
        ties=ties,
        losses=losses,
        rows={"held_out": len(before.tokens), "answered": len(before.completions)},
        samples=_samples(before, after),
        decoding=before.decoding,
        seconds={"before": before.seconds, "after": after.seconds},
        details=details,
    )


def _loss_entries(
    name: str, before: list[float], after: list[float], tokens: list[int], config: EvaluateConfig, sources: int = 0
) -> list[dict[str, Any]]:
    """The loss (nats a token) and, for held-out rows, the perplexity; nothing where nothing was measured."""
    if not any(tokens):
        return []
    loss = entry(f"{name}_loss", before, after, config, weights=tokens, alike=ALIKE, sources=sources)
    sides = (before, after)
    worst = max(nll / count for side in sides for nll, count in zip(side, tokens, strict=True) if count)
    if name != "held_out" or worst > LARGEST_EXPONENT:
        return [loss]
    perplexity = entry(
        "held_out_perplexity", before, after, config, weights=tokens, alike=ALIKE, perplexity=True, sources=sources
    )
    return [loss, perplexity]


def _gains(before: Measurement, after: Measurement) -> list[float]:
    """By how much each row of the main metric got better (scores, or nats a token)."""
    for name in before.metrics:
        return [now - was for was, now in zip(before.metrics[name], after.metrics[name], strict=True)]
    if before.called:  # of which some want a call
        rows = zip(before.called, after.called, strict=True)
        return [float(now.right) - float(was.right) for was, now in rows if was.wanted]
    if before.rejected_nll:
        return preferences.margins(before, after)
    losses = zip(before.nll, after.nll, before.tokens, strict=True)
    gains = [(was - now) / tokens for was, now, tokens in losses if tokens]
    return [0.0 if abs(gain) <= ALIKE else gain for gain in gains]


def _win_tie_loss(before: Measurement, after: Measurement) -> tuple[int, int, int]:
    gains = _gains(before, after)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return wins, len(gains) - wins - losses, losses


def _sentence(entries: list[dict[str, Any]], wins: int, ties: int, losses: int) -> str:
    """The verdict in words: the main metric, the rows behind it, and what got worse on the side."""
    main = entries[0]
    interval = main["interval"]
    span = f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}" if interval else ""
    opening = main["verdict"][0].upper() + main["verdict"][1:]
    text = (
        f"{opening}: {main['name']} {main['before']:.3f} → {main['after']:.3f} "
        f"(difference {main['difference']:+.3f}{span}; {main['n']} rows: {wins} won, {ties} tied, {losses} lost)."
    )
    others = {
        "general_text_loss": {"worse": "General text got worse"},
        "answers_ended": {"worse": "Fewer answers end by themselves"},
    }
    if any(line["name"] == "preference_accuracy" for line in entries):
        others["answer_tokens"] = {"higher": "Answers got longer, tokens", "lower": "Answers got shorter, tokens"}
        others["held_out_loss"] = {"worse": "The chosen answers became less likely, nats a token"}
    for line in entries[1:]:
        if line["name"] == "preference_accuracy":
            text += f" Preference accuracy {line['before']:.3f} → {line['after']:.3f}: {line['verdict']}."
        if line["name"] == "needless_calls" and line["verdict"] in ("better", "worse"):
            text += f" Needless calls {line['before']:.3f} → {line['after']:.3f}: {line['verdict']}."
        if line["name"] in REFUSALS:
            text += f" {REFUSALS[line['name']]} {line['before']:.2f} → {line['after']:.2f}: {line['verdict']}."
        said = others.get(line["name"], {}).get(line["verdict"])
        if said:
            text += f" {said}: {line['before']:.3f} → {line['after']:.3f}."
    return text


def _samples(before: Measurement, after: Measurement) -> list[dict[str, Any]]:
    """The first answered rows, both answers side by side with their scores."""
    return [
        {
            "where": before.where[row],
            "prompt": before.conversations[row],
            "reference": before.references[row],
            **{side: measured.completions[row].text for side, measured in (("before", before), ("after", after))},
            "scores": {name: [before.metrics[name][row], after.metrics[name][row]] for name in before.metrics},
            "ended": [before.completions[row].ended, after.completions[row].ended],
            **_sample_calls(before, after, row),
        }
        for row in range(min(SAMPLES, len(before.completions)))
    ]


def _sample_calls(before: Measurement, after: Measurement, row: int) -> dict[str, Any]:
    """What both called for a row, where they were given tools."""
    if not before.with_tools:
        return {}
    sides = (before.completions[row], after.completions[row])
    return {
        "calls": [
            [{"name": call.name, "arguments": call.arguments, "result": call.result} for call in side.calls]
            for side in sides
        ]
    }


def held_out_scores(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    metric: str = "loss",
    start: Measurement | None = None,
    beta: float = 1.0,
    toolbox: Toolbox | None = None,
) -> dict[str, float]:
    """{"loss": nats a token} on the held-out rows, with the mean of one more metric of the report where it is named.

    With `start`, the measurement before training, of preferences: the sigmoid loss of DPO at `beta` (arXiv 2305.18290,
    equation 7) and the preference accuracy. Raises SettingsError for a metric that these data do not have.
    """
    answered = config if metric != "loss" else replace(config, size=0, metrics=[], hub_metrics=[], reward_model=None)
    quiet = held_out_only(answered)
    box = None if metric == "loss" else toolbox  # a loss alone asks for no answers
    measurement = measure(model, tokenizer, data, quiet, distributions=False, toolbox=box, both_ways=False)
    scores = {"loss": measurement.loss}
    if start is not None and start.rejected_nll:
        scores = preferences.scores(start, measurement, beta)
    if metric not in scores:
        if metric not in measurement.metrics:
            known = ", ".join([*scores, *measurement.metrics])
            raise SettingsError(f"train.metric_for_best_model={metric} is not measured here.", f"Known: {known}")
        scores[metric] = sum(measurement.metrics[metric]) / len(measurement.metrics[metric])
    return scores
