"""Before and after on the same rows with the same decoding, and whether the difference is more than chance."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from finetune_kit import processes
from finetune_kit.config import EvaluateConfig, ModelConfig
from finetune_kit.data.chat import render_prompt
from finetune_kit.data.records import LabelledCompletion, prompt_of, reference_of
from finetune_kit.data.split import source_rows
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.evaluation import preferences
from finetune_kit.evaluation.divergence import Positions, choose_positions, log_probs
from finetune_kit.evaluation.intervals import ALIKE, SHARE, entry
from finetune_kit.evaluation.loss import general_losses, row_losses
from finetune_kit.evaluation.metrics import BUILT_IN, choose_metrics, score_rows
from finetune_kit.generation import Completion, generate
from finetune_kit.model.load import positions_of
from finetune_kit.terminal import console, doing, moved

if TYPE_CHECKING:
    import torch

Judge = Callable[[list[str], list[str], list[Any]], Sequence[float]]  # last turns, answers, records -> one score each
Progress = Callable[[str, int, int], None]  # what is measured, rows done, rows in all

SAMPLES = 8  # answers kept in report.json: the first rows, whatever they show
MARGIN = 8  # tokens beyond the longest held-out answer before a generation is cut off
LARGEST_EXPONENT = 700.0  # exp(710) is no float: a model that far gone has a loss but no perplexity


@dataclass
class Measurement:
    """What one model did on the held-out rows. Lists named alike have one entry a row, in the order of the data.

    Of pairs and labelled answers `nll` and `tokens` are those of the chosen (liked) answers; `paired`: the rejected
    ones' lists have the same rows, so that a row is a pair.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)  # scores of the answers, the main one first
    nll: list[float] = field(default_factory=list)  # nats, of each held-out row
    tokens: list[int] = field(default_factory=list)  # supervised tokens of each held-out row
    rejected_nll: list[float] = field(default_factory=list)  # nats, of each rejected or disliked answer
    rejected_tokens: list[int] = field(default_factory=list)
    paired: bool = False
    sources: int = 0  # rows of the data behind those of the losses; 0 where each is one
    positions: Positions = field(default_factory=list)  # where distributions were taken, in chosen answers
    log_probs: torch.Tensor | None = None  # (positions, vocabulary), those distributions
    general_nll: list[float] = field(default_factory=list)  # nats, of each stretch of the general text
    general_tokens: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # of each answered row
    conversations: list[str] = field(default_factory=list)  # before each answer, for people
    prompts: list[str] = field(default_factory=list)  # text of the last turn before the answer
    references: list[str] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    decoding: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Held-out loss, nats a token."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass
class Report:
    """Before against after. `main` names the metric that the verdict rests on; wins, ties and losses are its rows."""

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

    def to_json(self) -> dict[str, Any]:
        """The content of report.json: numbers, texts, lists and dicts only."""
        content = dict(vars(self))
        return {**content.pop("details"), **content}


def measure(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    progress: Progress | None = None,
    distributions: bool = True,
    judge: Judge | None = None,
) -> Measurement:
    """Loss on all held-out rows, answers to the first `config.size` held-out prompts, loss on the general text.

    `data` is a `data.load.Data`. Plain text has no prompts and gets the losses only; prompts alone have no losses. The
    model's mode, its generation settings and the random state are left as they were. `distributions`: of preferences,
    also keep the next-token distributions at some positions, for the KL divergence. `judge`: scores the answers, as
    metric "reward"; in its place evaluate.reward_model where that is set.
    Raises SettingsError (a metric that cannot act), DataError (nothing to measure), NumericsError (a loss or a score
    that is no number, with its row), ResourceError (memory, or a metric's package).
    """
    started = time.perf_counter()
    with doing("measuring") if progress else contextlib.nullcontext():
        measurement = _measured(model, tokenizer, data, config, progress, distributions, judge)
    measurement.seconds = time.perf_counter() - started
    return measurement


def _measured(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    progress: Progress | None,
    distributions: bool,
    judge: Judge | None,
) -> Measurement:
    measurement = Measurement()
    if data.kind != "text" and config.size > 0 and (_asked(data) or not data.held_out_records):
        metrics = choose_metrics(config.metrics, data, config.hub_metrics)  # before the work: it may refuse
        _answer(measurement, model, tokenizer, data, config, progress)
        moved("scoring the answers")
        measurement.metrics = processes.from_main(lambda: _scores(measurement, metrics, data, config, judge))
    elif config.metrics or config.hub_metrics or config.reward_model:
        reason = "plain text has no answers to score" if data.kind == "text" else "evaluate.size is 0"
        named = ", ".join([*config.metrics, *config.hub_metrics, *filter(None, [config.reward_model])])
        raise SettingsError(f"evaluate: scoring answers ({named}) has no effect: {reason}.", "Leave it out.")
    _losses(measurement, model, tokenizer, data, config, progress)
    if measurement.rejected_nll and distributions:
        moved("measuring distributions of the next token")
        _distributions(measurement, model, data)
    return measurement


def _answer(
    measurement: Measurement,
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    progress: Progress | None,
) -> None:
    """Greedy answers to the first `config.size` held-out prompts."""
    records = _asked(data)[: config.size]
    turns = [prompt_of(record) for record in records]
    measurement.where = [record.where for record in records]
    measurement.prompts = [str(before[-1]["content"]) if before else "" for before in turns]
    measurement.conversations = [_conversation(before) for before in turns]
    measurement.references = [reference_of(record) for record in records]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in measurement.references]
    longest = config.max_new_tokens or max(lengths, default=0) + MARGIN
    tools = [record.tools for record in records]
    rendering = (data.chat_template_kwargs, data.special_tokens_in_text)
    prompts = [render_prompt(tokenizer, *pair, *rendering) for pair in zip(turns, tools, strict=True)]

    limits = _limits(model, [len(prompt) for prompt in prompts], longest, measurement.where)
    told = _told(progress, "answers", len(prompts))

    def answer(mine: list[int]) -> list[Completion]:
        found: dict[int, Completion] = {}
        for limit in sorted({limits[index] for index in mine}, reverse=True):  # one, where the positions have no end
            chosen, done = [index for index in mine if limits[index] == limit], len(found)
            answers = generate(
                model,
                tokenizer,
                [prompts[index] for index in chosen],
                max_new_tokens=limit,
                end_token_ids=data.end_token_ids,
                batch_size=config.batch_size,
                progress=_beside(told, done),
            )
            found.update(zip(chosen, answers, strict=True))
        return [found[index] for index in mine]

    measurement.completions = processes.spread(len(prompts), answer, processes.is_sharded(model))
    ends = tokenizer.convert_ids_to_tokens(data.end_token_ids)
    measurement.decoding = {"do_sample": False, "max_new_tokens": longest, "end_tokens": ends}


def _beside(told: Callable[[int], None] | None, done: int) -> Callable[[int], None] | None:
    """Progress that counts on from what is done."""
    return None if told is None else lambda count: told(done + count)


def _limits(model: Any, lengths: list[int], longest: int, where: Sequence[str]) -> list[int]:
    """The most new tokens for each prompt: `longest`, and fewer where the model's learned positions end before.

    Raises DataError for a prompt that leaves no position for an answer.
    """
    room = positions_of(model)
    if room is None:
        return [longest] * len(lengths)
    limits = [min(longest, room - length) for length in lengths]
    if (least := min(limits, default=1)) < 1:
        row = limits.index(least)
        raise DataError(
            f"{where[row]}: a prompt of {lengths[row]:,} tokens; the model has positions for {room:,}, and its answer "
            "needs some.",
            "Take the row out, or answer no held-out prompts: evaluate.size=0",
        )
    if cut := sum(limit < longest for limit in limits):
        _say_once(
            f"note: {cut} of {len(limits)} held-out prompts leave fewer than {longest} of the model's {room:,} "
            "positions: their answers end there"
        )
    return limits


@cache
def _say_once(note: str) -> None:
    """What is measured before is measured after, too."""
    console.print(note, markup=False)


def _conversation(turns: Any) -> str:
    """The turns before an answer: of several each with its role, of one its text alone."""
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _asked(data: Any) -> list[Any]:
    """The held-out records whose prompts are answered: of labelled answers the liked ones."""
    return [item for item in data.held_out_records if not isinstance(item, LabelledCompletion) or item.label]


def _scores(
    measurement: Measurement, metrics: list[Any], data: Any, config: EvaluateConfig, judge: Judge | None
) -> dict[str, list[float]]:
    """Every metric's score of every answer, and the judge's."""
    found = {}
    predictions = [completion.text for completion in measurement.completions]
    metadata = [record.metadata for record in _asked(data)[: len(predictions)]]
    for metric in metrics:
        found[metric.name] = score_rows(metric, predictions, measurement.references, metadata, measurement.where)
    judge = _reward_model(config.reward_model, data) if config.reward_model else judge
    if judge is not None:
        scores = judge(measurement.prompts, predictions, _asked(data)[: len(predictions)])
        found["reward"] = [float(score) for score in scores]
    return found


def _reward_model(source: str, data: Any) -> Judge:
    """The reward model's score of an answer, of one that was cut off, too."""
    from finetune_kit.rl.rewards import RewardConfig, model_score

    return model_score(source, RewardConfig(ignore_gate=True), ModelConfig(), data.chat_template_kwargs)


def _losses(
    measurement: Measurement, model: Any, tokenizer: Any, data: Any, config: EvaluateConfig, progress: Progress | None
) -> None:
    """Loss of every held-out row, and of the general text."""
    chosen, rejected = preferences.sides(data)
    if data.kind != "prompt":
        both = [*chosen, *rejected]  # in one call: where a process scores both answers to a prompt, they share it
        rows, where = [row for row, _ in both], [_where(data, index) for _, index in both]
        told = _told(progress, "held-out loss", len(rows))
        nll, tokens = row_losses(model, rows, where, config.batch_size, told)
        measurement.nll, measurement.rejected_nll = nll[: len(chosen)], nll[len(chosen) :]
        measurement.tokens, measurement.rejected_tokens = tokens[: len(chosen)], tokens[len(chosen) :]
        measurement.sources = source_rows(where) if rejected else 0
        measurement.paired = bool(rejected) and data.kind == "preference"
        if sum(measurement.tokens) == 0:
            raise DataError("No held-out row has a supervised token, so there is no loss to measure.")
    if config.general_text:
        moved("measuring the loss of the general text")
        measurement.general_nll, measurement.general_tokens = general_losses(model, tokenizer, config.batch_size)


def _distributions(measurement: Measurement, model: Any, data: Any) -> None:
    """The model's next-token distributions at some positions of the chosen answers."""
    import torch

    rows = [row for row, _ in preferences.sides(data)[0]]
    measurement.positions = choose_positions(rows, model.config.get_text_config().vocab_size)
    measurement.log_probs = torch.cat(list(log_probs(model, measurement.positions)))


def _where(data: Any, row: int) -> str:
    """The held-out row's name for people; plain text is cut into blocks of its own."""
    return f"held-out block {row + 1}" if data.kind == "text" else str(data.held_out_records[row].where)


def _told(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(what, min(done * processes.count(), total), total)


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
    same = ("tokens", "rejected_tokens", "general_tokens", "where", "references", "decoding")
    differing = [name for name in same if getattr(before, name) != getattr(after, name)]
    if differing or before.metrics.keys() != after.metrics.keys():
        raise ValueError(f"before and after were not measured on the same rows in the same way: {differing}")
    entries = []
    for name, scores in before.metrics.items():
        within = SHARE if name in BUILT_IN else None  # rewards and scores of the Hub may be any numbers
        entries.append(entry(name, scores, after.metrics[name], config, higher_is_better=True, within=within))
    entries += preferences.entries(before, after, config, beta)
    entries += _loss_entries("held_out", before.nll, after.nll, before.tokens, config, before.sources)
    entries += _loss_entries("general_text", before.general_nll, after.general_nll, before.general_tokens, config)
    if before.completions:
        was, now = ([float(completion.ended) for completion in side.completions] for side in (before, after))
        entries.append(entry("answers_ended", was, now, config, higher_is_better=True, within=SHARE))
        was, now = ([float(len(item.ids)) for item in side.completions] for side in (before, after))
        entries.append(entry("answer_tokens", was, now, config, higher_is_better=None))
    if not entries:
        raise DataError("Nothing was measured.", "Leave evaluate.size or evaluate.general_text as it is.")
    main = entries[0]
    wins, ties, losses = _win_tie_loss(before, after)
    verdict, details = _sentence(entries, wins, ties, losses), {}
    if spent := [line["objective/kl"] for line in history if "objective/kl" in line]:
        details = {"kl_spent": spent[-1]}
        verdict += f" KL spent: {spent[-1]:.2f} nats a completion."
    return Report(
        metrics=entries,
        main=main["name"],
        verdict=verdict,
        improved=main["verdict"] == "better",
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
    if before.rejected_nll:
        return preferences.margins(before, after)
    rows = zip(before.nll, after.nll, before.tokens, strict=True)
    gains = [(was - now) / tokens for was, now, tokens in rows if tokens]
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
        }
        for row in range(min(SAMPLES, len(before.completions)))
    ]


def held_out_scores(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    metric: str = "loss",
    start: Measurement | None = None,
    beta: float = 1.0,
) -> dict[str, float]:
    """{"loss": nats a token} on the held-out rows, with the mean of one more metric of the report where it is named.

    With `start`, the measurement before training, of preferences: the sigmoid loss of DPO at `beta` (arXiv 2305.18290,
    equation 7) and the preference accuracy. Raises SettingsError for a metric that these data do not have.
    """
    answered = config if metric != "loss" else replace(config, size=0, metrics=[], hub_metrics=[], reward_model=None)
    measurement = measure(model, tokenizer, data, replace(answered, general_text=False), distributions=False)
    scores = {"loss": measurement.loss}
    if start is not None and start.rejected_nll:
        scores = preferences.scores(start, measurement, beta)
    if metric not in scores:
        if metric not in measurement.metrics:
            known = ", ".join([*scores, *measurement.metrics])
            raise SettingsError(f"train.metric_for_best_model={metric} is not measured here.", f"Known: {known}")
        scores[metric] = sum(measurement.metrics[metric]) / len(measurement.metrics[metric])
    return scores
