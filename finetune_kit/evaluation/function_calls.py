"""Calls by structure: whether a model calls what the data call, judged by name, arguments and types, with none run.

Each held-out row that lists tools is answered once: from its first turn that calls, else from its last answer. A row
that calls nothing wants no call. Ground truths with several accepted values (data/bfcl.py) are heeded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.bfcl import TRUTH, accepts
from finetune_kit.data.calls import parse_calls, syntax_of
from finetune_kit.data.chat import render_prompt
from finetune_kit.data.records import Message, PromptCompletion, last_assistant
from finetune_kit.errors import DataError
from finetune_kit.evaluation.intervals import SHARE, entry
from finetune_kit.generation.generate import Completion, generate
from finetune_kit.settings.schema import EvaluateConfig
from finetune_kit.tools.tool import misfit

SAMPLES = 8  # rows told in the report
ROOM = 16  # tokens that a template writes around a call, and some to spare


@dataclass
class Called:
    """One row: where it is from, the calls that it wants and those that the model made, each {"name", "arguments"}.

    `right`: the very calls, in any order, or none where none is wanted; `named`: the same names, each as often;
    `valid`: of the calls made, those that could be read, of a tool that is listed, with arguments that fit its schema.
    """

    where: str
    wanted: list[dict[str, Any]]
    made: list[dict[str, Any]]
    right: bool
    named: bool
    valid: list[bool]


def asked_for_calls(record: Any) -> tuple[list[Message], list[dict[str, Any]]] | None:
    """(the turns before the answer that is asked for, the calls which that makes); None for a row without tools."""
    if not isinstance(record, PromptCompletion) or not record.tools:
        return None
    calling = (at for at, turn in enumerate(record.messages) if turn.get("tool_calls"))
    at = next(calling, last_assistant(record.messages))
    return record.messages[:at], [call["function"] for call in record.messages[at].get("tool_calls") or ()]


def measure_calls(
    model: Any, tokenizer: Any, data: Any, config: EvaluateConfig, told: Callable[[int], None] | None = None
) -> list[Called]:
    """The first `config.size` held-out rows that list tools, greedily answered; none where the data have no such rows,
    no calls, or a template whose calls cannot be read back."""
    found = [(record, asked) for record in data.held_out_records if (asked := asked_for_calls(record)) is not None]
    found = found[: config.size]
    if not any(wanted for _, (_, wanted) in found):
        return []
    try:
        syntax = syntax_of(tokenizer, data.chat_template_kwargs)
    except DataError:
        return []
    kwargs = (data.chat_template_kwargs, data.special_tokens_in_text)
    prompts = [render_prompt(tokenizer, turns, record.tools, *kwargs) for record, (turns, _) in found]
    ends = list(dict.fromkeys([*data.end_token_ids, syntax.end_id]))
    texts = [[json.dumps(call) for call in wanted] for _, (_, wanted) in found]
    lengths = [sum(len(tokenizer(text)["input_ids"]) + ROOM for text in calls) for calls in texts]
    longest = config.max_new_tokens or max(lengths) + ROOM

    def answer(mine: list[int]) -> list[Completion]:
        chosen = [prompts[index] for index in mine]
        return generate(
            model,
            tokenizer,
            chosen,
            max_new_tokens=longest,
            end_token_ids=ends,
            batch_size=config.batch_size,
            progress=told,
        )

    answers = distributed.spread(len(prompts), answer, distributed.is_sharded(model))
    return [
        judged(record, wanted, parse_calls(syntax, _text(tokenizer, answer.ids), record.tools)[1])
        for (record, (_, wanted)), answer in zip(found, answers, strict=True)
    ]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def judged(record: Any, wanted: list[dict[str, Any]], parsed: Sequence[Any]) -> Called:
    """What a row's answer called; `parsed`: as data.calls.parse_calls gives it."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in record.tools}
    made = [{"name": call.name, "arguments": call.arguments} for call in parsed]
    valid = [
        not call.error and call.name in schemas and not misfit(call.arguments, schemas[call.name]) for call in parsed
    ]
    truth = record.metadata.get(TRUTH)
    same = accepts(truth, made) if truth and wanted else _same(made, wanted)
    named = Counter(call["name"] for call in made) == Counter(call["name"] for call in wanted)
    return Called(record.where, wanted, made, same and all(valid), named, valid)


def _same(made: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    left = list(made)
    for want in wanted:
        found = next((call for call in left if same_call(call["name"], call["arguments"], want)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def same_call(name: str, arguments: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """By structure: the name, the set of arguments, each value and its type. 3 and 3.0 are the same number, "3" is no
    number; of a text white space at its ends and the case of letters are no difference."""
    return name == wanted["name"] and _alike(arguments, wanted["arguments"])


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return bool(one == other)
    if type(one) is not type(other):
        return False
    if isinstance(one, str):
        return bool(one.strip().casefold() == other.strip().casefold())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def entries(before: list[Called], after: list[Called], config: EvaluateConfig) -> list[dict[str, Any]]:
    """The report's lines: `calls_right` of the rows that want a call, `needless_calls` of those that want none."""
    lines = []
    for name, wants in (("calls_right", True), ("needless_calls", False)):
        was, now = (
            [float(row.right if wants else bool(row.made)) for row in side if bool(row.wanted) is wants]
            for side in (before, after)
        )
        if was:
            lines.append(entry(name, was, now, config, higher_is_better=wants, within=SHARE))
    return lines


def details(before: list[Called], after: list[Called]) -> dict[str, Any]:
    """What the report says besides: shares of both sides, and some rows with what was called."""
    samples = [
        {
            "where": was.where,
            "wanted": was.wanted,
            "before": was.made,
            "after": now.made,
            "right": [was.right, now.right],
        }
        for was, now in zip(before[:SAMPLES], after[:SAMPLES], strict=True)
    ]
    return {"before": _shares(before), "after": _shares(after), "samples": samples}


def _shares(rows: list[Called]) -> dict[str, Any]:
    """Of rows that want a call those that call, that name the right tools, that are right in all; of all calls the
    valid ones. None where there is nothing to take a share of."""
    some = [row for row in rows if row.wanted]
    valid = [is_valid for row in rows for is_valid in row.valid]
    return {
        "rows_that_want_some": len(some),
        "rows_that_want_none": len(rows) - len(some),
        "call": _share([bool(row.made) for row in some]),
        "named": _share([row.named for row in some]),
        "right": _share([row.right for row in some]),
        "valid": _share(valid),
    }


def _share(found: list[bool]) -> float | None:
    return sum(found) / len(found) if found else None
