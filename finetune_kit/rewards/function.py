"""A reward function from a file: how the file is imported, how its parameters are read, and how it is called.

Two signatures are understood, told apart by the names of their parameters, in any order: ours, with `records`, and
TRL's (1.16, trl/trainer/grpo_trainer.py, _calculate_rewards), with the row's columns by name. The function is the
user's own code: what it changes of the process is put back after every call, and what it raises ends the run with an
error.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from finetune_kit.data.records import prompt_of
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.rewards.limits import Ended, Own, contained

log = logging.getLogger(__name__)

OURS = "def score(prompts, completions, records)"
CALLS = "calls"  # of each completion its tool calls, for either signature; a column of that name is what it was
TRLS = "def score(prompts, completions, completion_ids, **columns)"
# what TRL gives beside the columns; "prompt" and "completion" are not columns to it
FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_COLUMNS = ("prompt", "completion", "completion_ids")


def import_function(path: str, name: str, limit: float) -> tuple[Any, Own]:
    """(`name` of the Python file `path`, an instance where it is a class; what the file changed of the process).

    Modules beside the file can be imported by it. Raises SettingsError where there is no such file or function, or the
    import fails, exits, or takes more than `limit` seconds.
    """
    file = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location(f"finetune_kit_reward_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    own = Own()

    def load() -> Any:
        loader.exec_module(module)
        found = getattr(module, name, None)
        # of a class whose instances can be called the reward is an instance
        return found() if inspect.isclass(found) and any("__call__" in vars(base) for base in found.__mro__) else found

    try:
        found = contained(load, limit, own, file.parent)
    except Exception as error:
        said = str(error) if isinstance(error, Ended) else f"{type(error).__name__}: {error}"
        raise SettingsError(f"reward.sources: {path} cannot be imported: {said}") from error
    if not callable(found):
        raise SettingsError(
            f"reward.sources: {path} has no function {name}.",
            f"Write in it: {OURS.replace('score', name)}: return [0.0 for text in completions]",
        )
    return found, own


def bind(
    function: Any,
    name: str,
    *,
    columns: Sequence[str],
    conversational: bool,
    tokenize: Callable[[str], list[int]],
    limit: float,
    own: Own,
    folder: Path,
) -> Callable[..., Any]:
    """`function` as score(prompts, completions, records, completion_ids=, trainer_state=, log_extra=, log_metric=,
    calls=).

    It is called with the parameters that it names. `columns`: those of the rows. `conversational`: TRL's signature gets
    turns, as TRL gives where the rows' prompts are turns, else texts. `tokenize`: for completions that come without
    ids. `limit`: seconds a call. `own`, `folder`: see `contained`. What it gives back is not looked at here. `calls`:
    of each completion, dicts of what it called (name, arguments, result, valid, ok, seconds); none without tools.

    Raises SettingsError for any other signature.
    """
    ours, positional, named, everything = _parameters(function, name, columns)

    def score(prompts: list[str], completions: list[str], records: list[Any], **more: Any) -> Any:
        rows = copy.deepcopy(list(records))  # its own: what it changes in them reaches nobody
        given: dict[str, Any] = {
            column: [record.metadata.get(column) for record in rows] for column in columns if column not in FROM_TRL
        }
        passed = {column: values for column, values in given.items() if column not in NOT_COLUMNS}
        state = more.get("trainer_state")
        if "completion_ids" in named or "completion_ids" in positional or everything:
            ids = more.get("completion_ids")
            given["completion_ids"] = [tokenize(text) for text in completions] if ids is None else copy.deepcopy(ids)
        if "trainer_state" in named or "trainer_state" in positional or everything:
            given["trainer_state"] = _no_state() if state is None else copy.copy(state)
        given["log_extra"] = more.get("log_extra") or _say_nothing
        given["log_metric"] = more.get("log_metric") or _say_nothing
        given["prompts"], given["completions"] = list(prompts), list(completions)
        calls = [[asdict(call) for call in made] for made in more.get(CALLS) or [[]] * len(completions)]
        given.setdefault(CALLS, calls)
        if ours:
            given["records"] = rows
        elif conversational:
            given["prompts"] = [copy.deepcopy(prompt_of(record)) for record in rows]
            given["completions"] = [
                [*_turns(made), {"role": "assistant", "content": text}]
                for text, made in zip(completions, calls, strict=True)
            ]
        words = {key: given[key] for key in named if key in given}
        if everything:
            passed |= {key: given[key] for key in (*FROM_TRL, *([CALLS] if more.get(CALLS) else []))}
            words = {key: value for key, value in passed.items() if key not in positional} | words

        def call() -> Any:
            found = function(*(given[key] for key in positional), **words)
            found = asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
            return list(found) if isinstance(found, Iterator) else found  # a generator runs in here

        return contained(call, limit, own, folder, seed=0 if state is None else int(state.global_step))

    return score


def _turns(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls as the turns that TRL gives of them."""
    turns: list[dict[str, Any]] = []
    for call in calls:
        function = {"name": call["name"], "arguments": call["arguments"]}
        turns.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]})
        turns.append({"role": "tool", "name": call["name"], "content": call["result"]})
    return turns


async def _awaited(found: Any) -> Any:
    return await found


def _say_nothing(name: str, value: Any) -> None:
    """log_extra and log_metric where no log is kept."""


def _no_state() -> Any:
    from transformers.trainer_callback import TrainerState

    return TrainerState()


def _parameters(function: Any, name: str, columns: Sequence[str]) -> tuple[bool, list[str], list[str], bool]:
    """(whether it is our signature, what is given by place, what by name, whether it takes all the rest by name)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise _refused(name, "has no signature that can be read") from None
    kinds = {parameter.kind for parameter in parameters}
    everything = inspect.Parameter.VAR_KEYWORD in kinds
    single = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    ours = any(parameter.name == "records" for parameter in single)
    known = {"prompts", "completions", "records", CALLS} if ours else {*FROM_TRL, CALLS, *columns}
    unknown = [p.name for p in single if p.default is p.empty and p.name not in known]
    shown = f"({', '.join(str(parameter).split(':')[0].split('=')[0].strip() for parameter in parameters)})"
    if unknown:
        what = f"takes {shown}; " + (
            f"beside records there is no {' and no '.join(unknown)}"
            if ours
            else f"{' and '.join(unknown)}: no column of the rows ({', '.join(columns) or 'they have none'})"
        )
        raise _refused(name, what)
    seen = {"completions"} if ours else {"completions", "completion_ids"}
    if not everything and not seen & {parameter.name for parameter in single}:
        raise _refused(name, f"takes {shown}, and so never sees a completion")
    positional: list[str] = []
    for parameter in single:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            if parameter.name not in known:
                break  # it has a default, and what stands behind it cannot be given
            positional.append(parameter.name)
    named = [p.name for p in single if p.kind is not p.POSITIONAL_ONLY and p.name in known]
    return ours, positional, named, everything


def _refused(name: str, what: str) -> SettingsError:
    return SettingsError(
        f"reward {name} {what}.",
        f"Write {OURS}, or as for TRL {TRLS}, with columns of the rows by their names; in any order.",
    )


def numbers_of(found: Any, name: str, records: Sequence[Any]) -> list[float | None]:
    """What a reward returned as floats, None kept: it does not apply to that row. An array of one dimension is a list.

    Raises DataError for what is not a list of numbers; the row is named.
    """
    fix = "Return one number a completion, or None where the reward does not apply."
    if isinstance(found, str | bytes | dict | set | frozenset) or not hasattr(found, "__iter__"):
        raise DataError(f"reward {name} returned {_shown(found)}; expected a list of numbers.", fix)
    if getattr(found, "ndim", 1) != 1:
        shape = tuple(found.shape)
        raise DataError(f"reward {name} returned numbers of shape {shape}; expected a list of one a completion.", fix)
    numbers: list[float | None] = []
    for row, value in enumerate(found):
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of NumPy or torch
            value = value.item()
        if value is not None and not isinstance(value, Real | Decimal):  # a truth value is a number
            where = records[row].where if row < len(records) else f"completion {row + 1}"
            raise DataError(f"reward {name} returned {_shown(value)} at {where}; expected a number.", fix)
        try:
            numbers.append(None if value is None else float(value))
        except OverflowError:  # a whole number past 1e308
            numbers.append(float("inf"))
    return numbers


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"


def read_from_turns(record: Any) -> bool:
    """Whether a row's prompt was written as turns, which TRL calls conversational, and not as text."""
    turns = [turn for turn in prompt_of(record) if turn["role"] != "system"]
    if len(turns) != 1:
        return True
    for value in record.metadata.values():
        if isinstance(value, list) and any(
            isinstance(turn, dict) and turns[0]["content"] in (turn.get("content"), turn.get("value")) for turn in value
        ):
            return True
    return False


def raised(error: BaseException) -> str:
    """What happened, as a message continues with it after the reward's name."""
    return str(error) if isinstance(error, Ended) else f"raised {type(error).__name__}"
