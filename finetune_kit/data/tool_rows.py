"""Rows that offer tools: `data.tools` listed in rows that list none, and what such rows calculate as calls.

GSM8K's `48/2 = <<48/2=24>>24 clips` becomes the turn `48/2 =` with a call of the calculator, its result, and a turn
that continues with `24 clips`. A problem of reasoning_gym whose expression has its answer for a value becomes a call of
it, the result, and the answer. A row that calculates nothing stays as it is, with the tools listed: from such rows a
model learns when to call none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from finetune_kit.data.records import Message, Prompt, PromptCompletion, Record, Text
from finetune_kit.errors import SettingsError
from finetune_kit.tools.calculator import Refused, calculate
from finetune_kit.tools.load import load_tools

ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


def offer_tools(records: Sequence[Record], sources: Sequence[str]) -> list[str]:
    """Give rows without tools these, and make calls of what they calculate; what was done, in words.

    Raises SettingsError where no row takes them, and as `load_tools`.
    """
    schemas = [tool.schema for tool in load_tools(sources).values()]
    without = [record for record in records if not isinstance(record, Text) and not record.tools]
    if not without:
        raise SettingsError(
            f"data.tools={','.join(sources)} has no effect: every row lists tools of its own, or none can.",
            "Leave it out. Tools that the rows list run where they are named: tools=…",
        )
    called = plain = 0
    for record in without:
        record.tools = schemas
        if isinstance(record, PromptCompletion):
            record.as_strings = False
            if "calculator" in sources:
                made, left = _as_calls(record)
                called, plain = called + made, plain + left
    notes = [f"{len(without)} of {len(records)} rows are offered {', '.join(sources)} (data.tools)"]
    if called:
        notes.append(f"{called} of them call the calculator for what they calculate")
    if plain:
        notes.append(f"{plain} calculations in their text have another value than the calculator's: they stay text")
    return notes


def calls_of(record: Record) -> list[dict[str, Any]] | None:
    """The calls that a row makes behind its last user turn, each {"name", "arguments"}; None where it does not say:
    a prompt alone, unless it is a problem with an expression."""
    if isinstance(record, PromptCompletion):
        last = max((at for at, turn in enumerate(record.messages) if turn["role"] == "user"), default=0)
        return [call["function"] for turn in record.messages[last:] for call in turn.get("tool_calls") or ()]
    expression = _expression(record.metadata, record.completion) if isinstance(record, Prompt) else None
    return None if expression is None else [{"name": "calculator", "arguments": {"expression": expression.strip()}}]


def _expression(metadata: dict[str, Any], answer: str) -> str | None:
    """What a task's generator says that its problem calculates, where that has the answer for a value."""
    made = metadata.get("metadata")
    expression = made.get("expression") if isinstance(made, dict) else None
    return expression if isinstance(expression, str) and _value(expression, answer) is not None else None


def _as_calls(record: PromptCompletion) -> tuple[bool, int]:
    """Rewrite a row's answers; (whether a call was made, calculations left as text)."""
    answer = str(record.messages[-1]["content"])
    expression = _expression(record.metadata, answer)
    if expression is not None and len(record.messages) >= 2:
        record.messages[-1:] = [*_call("", expression), {"role": "assistant", "content": answer}]
        return True, 0
    written: list[Message] = []
    left = 0
    for message in record.messages:
        if message["role"] != "assistant" or message.get("tool_calls"):
            written.append(message)
            continue
        turns, kept = _turns(message)
        written += turns
        left += kept
    called = len(written) > len(record.messages)
    record.messages[:] = written
    return called, left


def _turns(message: Message) -> tuple[list[Message], int]:
    """(an answer with its annotations as calls, annotations that stay text)."""
    turns: list[Message] = []
    said, at, left = "", 0, 0
    text = str(message["content"])
    for found in ANNOTATION.finditer(text):
        said += text[at : found.start()]
        at = found.end()
        if _value(found.group(1), found.group(2)) is None:
            left += 1
            continue
        flags = {name: message[name] for name in ("train",) if name in message}
        call, result = _call(said.strip(), found.group(1))
        turns += [{**call, **flags}, result]
        said = ""
    if not turns and not left:
        return [message], 0
    return [*turns, {**message, "content": said + text[at:]}], left


def _call(said: str, expression: str) -> list[Message]:
    """The assistant's turn that calls the calculator, and the tool's."""
    expression = expression.strip()
    function: dict[str, Any] = {"name": "calculator", "arguments": {"expression": expression}}
    call = {"role": "assistant", "content": said, "tool_calls": [{"type": "function", "function": function}]}
    return [call, {"role": "tool", "name": "calculator", "content": calculate(expression)}]


def _value(expression: str, written: str) -> str | None:
    """The expression's value where `written` is that, rounded or cut to as many decimals; else None."""
    try:
        value, said = calculate(expression), Fraction(written.strip().replace(",", "").replace("$", "").rstrip("%"))
    except (Refused, ValueError, ZeroDivisionError):
        return None
    decimals = len(written.strip().rstrip("%").partition(".")[2])
    return value if abs(Fraction(value) - said) < Fraction(1, 10**decimals) else None
