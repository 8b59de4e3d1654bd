"""Rewards: what a completion is worth. Each is a function score(prompts, completions, records) -> one number a row.

`prompts` are the last turns before the answers, `completions` the answers without their end token, `records` the rows
themselves (data/records.py: messages, tools, metadata, completion). None: the reward does not apply to that row. What
a reward gives back is checked before it moves a weight. Functions of the user's: rewards/function.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_kit.data.load import Data
from finetune_kit.data.tasks import PREFIX
from finetune_kit.data.token_ids import ids_of
from finetune_kit.errors import DataError, FinetuneKitError, NumericsError, SettingsError
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.function import bind, import_function, numbers_of, raised, read_from_turns
from finetune_kit.rewards.limits import Ended
from finetune_kit.rewards.models import check_gate, check_judge, model_score, place_of
from finetune_kit.rewards.settings import KNOWN, RewardConfig
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.schema import ModelConfig

Score = Callable[..., Any]  # what it returns is looked at by `checked`


@dataclass(frozen=True)
class Part:
    """One reward: its name in the log, its weight, and its function. `in_full`: that takes completion_ids,
    trainer_state, log_extra, log_metric and calls, too, by name."""

    name: str
    weight: float
    score: Score
    in_full: bool = False


@dataclass(frozen=True)
class Rewards:
    """Several rewards, added up with their weights."""

    parts: tuple[Part, ...]

    def __call__(
        self, prompts: list[str], completions: list[str], records: list[Any], **more: Any
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(the weighted sum of each row, each part's own scores by name), NaN where a part does not apply.

        Parts that do not apply to a row are left out of its sum, as TRL does; it is NaN where none applies. `more`:
        completion_ids, trainer_state, log_extra, log_metric, calls, for functions that take them.
        Raises DataError where a part raises or gives another number of scores than rows, NumericsError for a score
        that is not finite; both name the row.
        """
        found = {part.name: checked(part, prompts, completions, records, **more) for part in self.parts}
        weights = [part.weight for part in self.parts]
        return [_sum(weights, row) for row in zip(*found.values(), strict=True)], found

    def judge(self, prompts: list[str], completions: list[str], records: list[Any], **more: Any) -> list[float]:
        """The weighted sum of each row, for the report; 0 where no reward applies, before as after."""
        return [0.0 if math.isnan(score) else score for score in self(prompts, completions, records, **more)[0]]


def _sum(weights: list[float], scores: Sequence[float]) -> float:
    applied = [(weight, score) for weight, score in zip(weights, scores, strict=True) if not math.isnan(score)]
    return sum(weight * score for weight, score in applied) if applied else math.nan


def checked(part: Part, prompts: list[str], completions: list[str], records: list[Any], **more: Any) -> list[float]:
    """The part's scores as floats, one a row; NaN where it does not apply."""
    try:
        given = part.score(list(prompts), list(completions), list(records), **(more if part.in_full else {}))
        found = numbers_of(given, part.name, records)
    except FinetuneKitError:
        raise
    except Exception as error:  # it is the user's function, and may raise anything
        slow = isinstance(error, Ended) and "reward.timeout" in str(error)
        at = None if slow else _first_refused(part, prompts, completions, records, **more)
        where = f"at {records[at].where} (completion {completions[at][:80]!r})" if at is not None else "on the batch"
        detail = "" if isinstance(error, Ended) else f": {error}"
        raise DataError(
            f"reward {part.name} {raised(error)} {where}{detail}",
            "Fix what it waits for, or allow it more: reward.timeout=…"
            if slow
            else "It must return one number for any completion, an empty one included.",
        ) from error
    if len(found) != len(completions):
        raise DataError(
            f"reward {part.name} returned {len(found)} scores for {len(completions)} completions.",
            "Return one number a completion, in their order.",
        )
    for score, completion, record in zip(found, completions, records, strict=True):
        if score is not None and not math.isfinite(score):
            raise NumericsError(
                f"reward {part.name} is {score} at {record.where} (completion {completion[:80]!r}).",
                "Let it return a finite number for any completion, or None where it does not apply.",
            )
    return [math.nan if score is None else score for score in found]


def _first_refused(
    part: Part, prompts: list[str], completions: list[str], records: list[Any], **more: Any
) -> int | None:
    """The first row that makes the part raise alone, too."""
    ids, calls = more.get("completion_ids"), more.get("calls")
    for row, (prompt, completion, record) in enumerate(zip(prompts, completions, records, strict=True)):
        alone = {**more, "completion_ids": ids and [ids[row]], "calls": calls and [calls[row]]}
        alone |= {"log_extra": None, "log_metric": None}
        try:
            part.score([prompt], [completion], [record], **(alone if part.in_full else {}))
        except Exception:
            return row
    return None


def load_rewards(config: RewardConfig, data: Data, model: ModelConfig, policy: Any = None) -> Rewards:
    """The rewards that the settings name. `model`: the policy's settings; `policy`: given, a reward model with an
    adapter on the same base is put beside the policy's adapter and needs no second base.

    Raises SettingsError for a source that cannot be, a wrong number of weights, or a reward model that did not pass.
    """
    _check_lists(config)
    weights = config.weights or [1.0] * len(config.sources)
    parts = [
        _part(source, weight, config, data, model, policy)
        for source, weight in zip(config.sources, weights, strict=True)
    ]
    names = [part.name for part in parts]
    parts = [
        part if names.count(part.name) == 1 else replace(part, name=f"{part.name}_{at}")
        for at, part in enumerate(parts, start=1)
    ]
    return Rewards(tuple(parts))


def _check_lists(config: RewardConfig) -> None:
    if not config.sources:
        raise SettingsError("reward.sources is empty: nothing would be learned.", KNOWN)
    if config.weights and len(config.weights) != len(config.sources):
        raise SettingsError(
            f"reward.weights has {len(config.weights)} numbers for {len(config.sources)} sources.", "Give one each."
        )
    if len(set(config.sources)) != len(config.sources):
        raise SettingsError("reward.sources names one source twice.", "Give it once, with reward.weights.")


def check_sources(config: RewardConfig, rows: Sequence[str], policy: ModelConfig) -> None:
    """What load_rewards would say of these sources without loading data, weights or a function.

    `rows`: the data's paths. Raises SettingsError.
    """
    _check_lists(config)
    for source in config.sources:
        path, colon, _ = source.rpartition(":")
        if source == "task":
            if not all(name.startswith(PREFIX) for name in rows):
                raise no_scorer()
        elif source.endswith(".py"):
            raise SettingsError(f"reward.sources: {source} names no function.", f"Write {source}:score")
        elif colon and path.endswith(".py"):
            _function_file(path)
        else:
            check_judge("reward.sources", source, policy)
            check_gate(place_of(source), config.ignore_gate)


def _part(source: str, weight: float, config: RewardConfig, data: Data, model: ModelConfig, policy: Any) -> Part:
    if source == "task":
        return Part("task", weight, task_score(data))
    path, colon, function = source.rpartition(":")
    if colon and path.endswith(".py"):
        return Part(function, weight, python_score(path, function, config, data, model), in_full=True)
    if source.endswith(".py"):
        raise SettingsError(f"reward.sources: {source} names no function.", f"Write {source}:score")
    return Part(Path(source).name, weight, model_score(source, config, model, data.chat_template_kwargs, policy))


def task_score(data: Data) -> Score:
    """The data's own scorer in [0, 1], as the report uses it. Raises SettingsError where the data have none."""
    scorer = data.score
    if scorer is None:
        raise no_scorer()
    return lambda prompts, completions, records: [
        scorer(completion, record.metadata) for completion, record in zip(completions, records, strict=True)
    ]


def no_scorer() -> SettingsError:
    return SettingsError(
        "reward.sources=[task]: these data have no scorer of their own (reasoning_gym/<task> has, and needs "
        "held-out rows).",
        "Set reward.sources to path/to/file.py:function or to a reward model.",
    )


def _function_file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"reward.sources: {path}: no such file.", near_path(path) + KNOWN)
    return file


def python_score(path: str, function: str, config: RewardConfig, data: Data, model: ModelConfig) -> Score:
    """`function` of the Python file `path`, called by the names of its parameters.

    Raises SettingsError where there is no such file or function, or it has another signature than the two.
    """
    file = _function_file(path)
    found, own = import_function(path, function, config.timeout)
    rows = [record for record in (*data.train_records, *data.held_out_records) if hasattr(record, "metadata")]
    tokenizers: list[Any] = []

    def tokenize(text: str) -> list[int]:
        if not tokenizers:
            tokenizers.append(load_tokenizer(model))
        return list(ids_of(tokenizers[0], text))

    return bind(
        found,
        function,
        columns=list(dict.fromkeys(column for record in rows for column in record.metadata)),
        conversational=any(read_from_turns(record) for record in rows),
        tokenize=tokenize,
        limit=config.timeout,
        own=own,
        folder=file.parent,
    )
