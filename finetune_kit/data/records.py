"""The record kinds that every source is turned into. A record has been checked: roles known, contents text.

`where` names the row for people: `train.jsonl:17` (file and 1-based row), `reasoning_gym/task:17`, `hub/id:17`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# role, content (text); optional: tool_calls, tool_call_id, name, reasoning_content; ours: train, plain (bare text)
Message = dict[str, Any]
# keys under which a message or a row has a thought; records have the first one
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(slots=True)
class Text:
    """Plain text to continue pretraining on. `ends`: a document ends here, so the end token follows."""

    where: str
    text: str
    ends: bool = True


@dataclass(slots=True)
class PromptCompletion:
    """A conversation with at least one assistant turn.

    `as_strings`: the row was two bare strings, which can also be trained without a chat template.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    as_strings: bool = False


@dataclass(slots=True)
class Prompt:
    """A conversation that waits for an answer.

    `completion`: the row's own answer as text, "" where it has none. `metadata`: all columns of the row as they were
    read, under their own names; rewards judge by these two.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    completion: str = ""


@dataclass(slots=True)
class Preference:
    """Two answers to one prompt; `chosen` and `rejected` are the turns after it.

    `margin`: how much better the chosen one is, in the data's own unit. `defect`: why the row is not a pair, in words.
    """

    where: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None
    defect: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class LabelledCompletion:
    """One answer and whether it was liked. `defect`: why it cannot be used, in words."""

    where: str
    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[dict[str, Any]] | None = None
    defect: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


Record = Text | PromptCompletion | Prompt | Preference | LabelledCompletion

KINDS: dict[type, str] = {
    Text: "text",
    PromptCompletion: "prompt_completion",
    Prompt: "prompt",
    Preference: "preference",
    LabelledCompletion: "labelled_completion",
}


def last_assistant(messages: list[Message]) -> int:
    """Index of the last assistant turn, -1 if there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


def prompt_of(record: Record) -> list[Message]:
    """The turns that a model is given: all before the last assistant turn, or the prompt; none for plain text."""
    if isinstance(record, Text):
        return []
    if isinstance(record, PromptCompletion):
        return record.messages[: max(0, last_assistant(record.messages))]
    return record.messages if isinstance(record, Prompt) else record.prompt


def asked_of(record: Record) -> list[Message]:
    """The turns that a model with tools is given: of a conversation all up to its last user turn, whose answer may
    take several turns; else as `prompt_of`."""
    if not isinstance(record, PromptCompletion):
        return prompt_of(record)
    before = prompt_of(record)
    last = max((at for at, turn in enumerate(before) if turn["role"] == "user"), default=-1)
    return before[: last + 1] if last >= 0 else before


def reference_of(record: Record) -> str:
    """Text of the last assistant turn (of the chosen side in a preference), or a prompt's own answer; "" if there is
    none."""
    if isinstance(record, Prompt):
        return record.completion
    turns: list[Message] = []
    if isinstance(record, PromptCompletion):
        turns = record.messages
    elif isinstance(record, Preference):
        turns = record.chosen
    elif isinstance(record, LabelledCompletion):
        turns = record.completion
    index = last_assistant(turns)
    return str(turns[index]["content"]) if index >= 0 else ""
