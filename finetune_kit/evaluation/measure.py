"""What one model does on the held-out rows: losses, answers and their scores, distributions."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from finetune_kit import distributed
from finetune_kit.data.chat import render_prompt
from finetune_kit.data.records import LabelledCompletion, PromptCompletion, asked_of, prompt_of, reference_of
from finetune_kit.data.split import source_rows
from finetune_kit.data.template import bos_prefix
from finetune_kit.data.tool_rows import calls_of
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.evaluation import preferences
from finetune_kit.evaluation.choices import Choices, measure_choices, read_choices
from finetune_kit.evaluation.divergence import Positions, choose_positions, log_probs
from finetune_kit.evaluation.fairness import Fairness, measure_fairness, read_bbq
from finetune_kit.evaluation.function_calls import Called, measure_calls
from finetune_kit.evaluation.guards import choice_sources
from finetune_kit.evaluation.loss import general_losses, row_losses
from finetune_kit.evaluation.metrics import choose_metrics, score_rows
from finetune_kit.evaluation.safety import Safety, measure_safety
from finetune_kit.generation.generate import Completion, generate
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.models.shapes import positions_of
from finetune_kit.settings.schema import EvaluateConfig, ModelConfig
from finetune_kit.system.terminal import console, doing, moved

if TYPE_CHECKING:
    import torch


# last turns, answers, records -> one score each; answers with tools come with their `calls`
Judge = Callable[..., Sequence[float]]
Progress = Callable[[str, int, int], None]  # what is measured, rows done, rows in all
MARGIN = 8  # tokens beyond the longest held-out answer before a generation is cut off


@dataclass
class Measurement:
    """What one model did on the held-out rows: parallel lists, one entry per row, in the order of the data.

    For pairs and labelled answers `nll` and `tokens` are those of the chosen (liked) answers; `paired`: the rejected
    ones' lists have the same rows, so a row is a pair.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)  # scores of the answers, the main one first
    nll: list[float] = field(default_factory=list)  # nats, of each held-out row
    tokens: list[int] = field(default_factory=list)  # supervised tokens of each held-out row
    rejected_nll: list[float] = field(default_factory=list)  # nats, of each rejected or disliked answer
    rejected_tokens: list[int] = field(default_factory=list)
    paired: bool = False
    sources: int = 0  # rows of the data behind those of the losses; 0 where each is one
    text_nll: list[float] = field(default_factory=list)  # nats, of each held-out text, its end token included
    text_bytes: list[int] = field(default_factory=list)  # of UTF-8 that these nats tell, whatever the tokenizer
    positions: Positions = field(default_factory=list)  # where distributions were taken, in chosen answers
    log_probs: torch.Tensor | None = None  # (positions, vocabulary), those distributions
    general_nll: list[float] = field(default_factory=list)  # nats, of each stretch of the general text
    general_tokens: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # of each answered row
    conversations: list[str] = field(default_factory=list)  # before each answer, for people
    prompts: list[str] = field(default_factory=list)  # text of the last turn before the answer
    references: list[str] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    with_tools: bool = False
    bare: dict[str, list[float]] = field(default_factory=dict)  # the same scores of answers without the tools
    wanted: list[list[dict[str, Any]] | None] = field(default_factory=list)  # the calls of each answered row, if known
    called: list[Called] = field(default_factory=list)  # of rows that list tools, where none are run
    decoding: dict[str, Any] = field(default_factory=dict)
    safety: Safety | None = None  # answers to harmful and harmless prompts
    choices: list[Choices] = field(default_factory=list)  # of each file, what is likeliest
    fairness: Fairness | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Held-out loss, nats a token."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def held_out_only(config: EvaluateConfig) -> EvaluateConfig:
    """The same without what is measured on other rows than the run's own."""
    return replace(config, general_text=False, safety=None, choices=[], fairness=None, guards=[])


def measure(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    progress: Progress | None = None,
    distributions: bool = True,
    judge: Judge | None = None,
    toolbox: Toolbox | None = None,
    both_ways: bool = True,
) -> Measurement:
    """Loss on all held-out rows, answers to the first `config.size` held-out prompts, loss on the general text.

    `data` is a `data.load.Data`. Plain text has no prompts and gets the losses only; prompts alone have no losses. The
    model's mode, its generation settings and the random state are left as they were. `distributions`: of preferences,
    also keep the next-token distributions at some positions, for the KL divergence. `judge`: scores the answers, as
    metric "reward"; in its place evaluate.reward_model where that is set. `toolbox`: tools that the answers may call;
    `both_ways`: the same prompts are then also answered and scored with no tool offered.
    Raises SettingsError (a metric that has no effect), DataError (nothing to measure), NumericsError (a loss or a score
    that is not a number, with its row), ResourceError (memory, or a metric's package).
    """
    started = time.perf_counter()
    with doing("measuring") if progress else contextlib.nullcontext():
        measurement = _measured(model, tokenizer, data, config, progress, distributions, judge, toolbox, both_ways)
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
    toolbox: Toolbox | None,
    both_ways: bool,
) -> Measurement:
    measurement = Measurement(with_tools=toolbox is not None)
    if data.kind != "text" and config.size > 0 and (_asked(data) or not data.held_out_records):
        metrics = choose_metrics(config.metrics, data, config.hub_metrics)  # before the work: it may refuse
        _answer(measurement, model, tokenizer, data, config, progress, toolbox)
        moved("scoring the answers")
        measurement.metrics = distributed.from_main(lambda: _scores(measurement, metrics, data, config, judge))
        if toolbox is None and data.kind == "prompt_completion":
            told = _told(progress, "calls", min(config.size, len(data.held_out_records)))
            measurement.called = measure_calls(model, tokenizer, data, config, told)
        if toolbox is not None and both_ways and measurement.metrics:
            bare = Measurement()
            _answer(bare, model, tokenizer, data, config, progress, replace(toolbox, tools={}))
            measurement.bare = distributed.from_main(lambda: _scores(bare, metrics, data, config, judge))
    elif toolbox is not None and (data.kind == "text" or config.size == 0):
        reason = "plain text has no answers" if data.kind == "text" else "evaluate.size is 0"
        raise SettingsError(f"tools have no effect: {reason}.", "Leave them out.")
    elif config.metrics or config.hub_metrics or config.reward_model:
        reason = "plain text has no answers to score" if data.kind == "text" else "evaluate.size is 0"
        named = ", ".join([*config.metrics, *config.hub_metrics, *filter(None, [config.reward_model])])
        raise SettingsError(f"evaluate: scoring answers ({named}) has no effect: {reason}.", "Leave it out.")
    _losses(measurement, model, tokenizer, data, config, progress)
    if config.safety:
        told = _told(progress, "refusals", config.safety_size)
        measurement.safety = measure_safety(model, tokenizer, data, config, told)
    _questions(measurement, model, tokenizer, config, progress)
    if measurement.rejected_nll and distributions:
        moved("measuring distributions of the next token")
        _distributions(measurement, model, data)
    return measurement


def _questions(
    measurement: Measurement, model: Any, tokenizer: Any, config: EvaluateConfig, progress: Progress | None
) -> None:
    """Multiple choice: the files of evaluate.choices and of the guards, and evaluate.fairness."""
    for source in choice_sources(config):
        questions = read_choices(source, config.choices_size)
        told = _told(progress, f"choices of {source}", sum(len(question.choices) for question in questions))
        measurement.choices.append(measure_choices(model, tokenizer, source, questions, config, told))
    if config.fairness:
        rows, questions = read_bbq(config.fairness, config.choices_size)
        told = _told(progress, "fairness", 3 * len(questions))
        measurement.fairness = measure_fairness(model, tokenizer, rows, questions, config, told)


def _answer(
    measurement: Measurement,
    model: Any,
    tokenizer: Any,
    data: Any,
    config: EvaluateConfig,
    progress: Progress | None,
    toolbox: Toolbox | None,
) -> None:
    """Greedy answers to the first `config.size` held-out prompts. A toolbox without tools: the same prompts, with none
    offered."""
    records = _asked(data)[: config.size]
    turns = [prompt_of(record) if toolbox is None else asked_of(record) for record in records]
    measurement.wanted = [calls_of(record) for record in records] if toolbox is not None else []
    measurement.where = [record.where for record in records]
    measurement.prompts = [str(before[-1]["content"]) if before else "" for before in turns]
    measurement.conversations = [_conversation(before) for before in turns]
    measurement.references = [reference_of(record) for record in records]
    lengths = [_tokens_of_answer(tokenizer, record, toolbox) for record in records]
    longest = config.max_new_tokens or max(lengths, default=0) + MARGIN
    tools = [record.tools if toolbox is None or toolbox.tools else None for record in records]
    rendering = (data.chat_template_kwargs, data.special_tokens_in_text)
    prompts = [render_prompt(tokenizer, *pair, *rendering) for pair in zip(turns, tools, strict=True)]

    limits = _limits(model, [len(prompt) for prompt in prompts], longest, measurement.where)
    told = _told(progress, "answers", len(prompts))

    def answer(mine: list[int]) -> list[Completion]:
        found: dict[int, Completion] = {}
        for limit in sorted({limits[index] for index in mine}, reverse=True):  # one, where the positions have no end
            chosen, done = [index for index in mine if limits[index] == limit], len(found)
            if toolbox is not None and toolbox.tools:
                from finetune_kit.generation.tool_loop import answer_with_tools  # it loads torch

                called = answer_with_tools(
                    model,
                    tokenizer,
                    [(turns[index], tools[index]) for index in chosen],
                    toolbox,
                    max_new_tokens=limit,
                    end_token_ids=data.end_token_ids,
                    batch_size=config.batch_size,
                    positions=positions_of(model),
                    progress=_beside(told, done),
                )
                found.update(zip(chosen, called, strict=True))
                continue
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

    if toolbox is not None and toolbox.tools and distributed.is_sharded(model):
        raise SettingsError(
            "tools: a model in shards computes all its rows together, and these wait for their tools.",
            "Measure the finished run on one device: python -m finetune_kit evaluate DIR tools=…",
        )
    measurement.completions = distributed.spread(len(prompts), answer, distributed.is_sharded(model))
    ends = tokenizer.convert_ids_to_tokens(data.end_token_ids)
    measurement.decoding = {"do_sample": False, "max_new_tokens": longest, "end_tokens": ends}
    if toolbox is not None:
        measurement.decoding["tools"] = list(toolbox.tools)


def _tokens_of_answer(tokenizer: Any, record: Any, toolbox: Toolbox | None) -> int:
    """About how many tokens of its own a row's answer has: with tools in all its turns, else in the last one."""
    own = []
    if isinstance(record, PromptCompletion):
        turns = record.messages[len(asked_of(record) if toolbox is not None else prompt_of(record)) :]
        own = [turn for turn in turns if turn["role"] == "assistant"]
    if not any(turn.get("tool_calls") for turn in own):
        return len(tokenizer(reference_of(record), add_special_tokens=False)["input_ids"])
    texts = [str(turn["content"]) for turn in own]
    texts += [json.dumps(call["function"]) for turn in own for call in turn.get("tool_calls") or ()]
    marks = 16 * sum(len(turn.get("tool_calls") or ()) for turn in own) + len(
        own
    )  # what a template writes around a call
    return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) + marks


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
            "Remove the row, or answer no held-out prompts: evaluate.size=0",
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
    calls = {"calls": [completion.calls for completion in measurement.completions]} if measurement.with_tools else {}
    if config.reward_model:
        judge, calls = _reward_model(config.reward_model, data), {}
    if judge is not None:
        scores = judge(measurement.prompts, predictions, _asked(data)[: len(predictions)], **calls)
        found["reward"] = [float(score) for score in scores]
    return found


def _reward_model(source: str, data: Any) -> Judge:
    """The reward model's score of an answer, of one that was cut off, too."""
    from finetune_kit.rewards.models import model_score
    from finetune_kit.rewards.settings import RewardConfig

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
        if data.kind == "text":
            measurement.text_nll, measurement.text_bytes = of_texts(data, measurement.nll, tokenizer)
        if sum(measurement.tokens) == 0:
            raise DataError("No held-out row has a supervised token, so there is no loss to measure.")
    if config.general_text:
        moved("measuring the loss of the general text")
        measurement.general_nll, measurement.general_tokens = general_losses(model, tokenizer, config.batch_size)


def of_texts(data: Any, nll: Sequence[float], tokenizer: Any) -> tuple[list[float], list[int]]:
    """(nats, bytes) of each held-out text, from the nats of its blocks: what bits per byte are made of.

    Bytes are counted in the text, never by decoding tokens: a token that is a part of a character decodes to a mark of
    three bytes. Every token is predicted but the first of a text whose tokenizer begins none with a token of its own:
    what that one says does not count. The end token costs nats and says no byte.
    """
    texts = [record.text for record in data.held_out_records]
    totals = [0.0] * len(texts)
    for block, nats in zip(data.held_out, nll, strict=True):
        totals[block["row"]] += nats
    begun = bool(bos_prefix(tokenizer))
    return totals, [len(text.encode()) - (0 if begun else _first_bytes(tokenizer, text)) for text in texts]


def _first_bytes(tokenizer: Any, text: str) -> int:
    """Bytes of a text that its first token says; of a character that begins there and ends later, none."""
    first = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    said: str = tokenizer.decode(first)
    return len(said.encode()) if text.startswith(said) else 0


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
    return None if progress is None else lambda done: progress(what, min(done * distributed.count(), total), total)
