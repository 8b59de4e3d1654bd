"""What the columns beside a question and its answer mean, and which of a row's columns were used.

A converter takes the columns that become part of its records; the others are named once, in the ledger and on the
console. Nothing that a row says vanishes without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_kit.data.messages import (
    describe,
    is_transcript,
    messages_of,
    parse_json,
    side_of,
    text_of,
    transcript_of,
    unused_keys,
)
from finetune_kit.data.records import THOUGHTS, Message
from finetune_kit.errors import DataError

SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt", "sys")
PASSAGES = ("passage", "article")  # that a question is about: BoolQ's and RACE's
GIVEN = ("input", "context", *PASSAGES)  # what a question is about
CHOICES = ("choices", "options")
HISTORY = "history"
UNUSED = "unused"  # in data.columns: a column that is known and left out
# columns that are a thought; the first ones are keys of turns as well
THOUGHT_COLUMNS = (*THOUGHTS, "cot", "complex_cot", "chain_of_thought", "rationale", "think")
NAMES = (*SYSTEMS, *GIVEN, *CHOICES, HISTORY, *THOUGHT_COLUMNS, UNUSED)
ANSWER_KEY = "answer_key"  # the label of the right choice
_ANSWER_KEYS = ("input", "output", "response", "completion", "answer", "text", "content")
_SCORE_KEYS = ("scores", "score", "ratings", "rating", "overall_score", "ranks", "rank", "ranking")


class Row(dict[str, Any]):
    """A row's columns under our names. `used`: those that became part of its records; `waits`: a conversation that
    ends with the user's turn is a prompt."""

    def __init__(self, columns: dict[str, Any], waits: bool = False) -> None:
        super().__init__(columns)
        self.waits = waits
        self.used: set[str] = set()

    def take(self, name: str) -> Any:
        """The column's value, which becomes part of a record."""
        self.used.add(name)
        return self.get(name)

    def first(self, names: tuple[str, ...]) -> str:
        """The first of `names` that has a text in it, "" where none has."""
        return next((name for name in names if isinstance(self.get(name), str) and self[name].strip()), "")

    def join_parts(self, names: tuple[str, ...]) -> None:
        """Let a column that is a list of `{"text": …}` be their text."""
        for name in names:
            value = self.get(name)
            if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
                texts = [part.get("text") for part in value]
                if all(isinstance(text, str) for text in texts):
                    self[name] = "\n\n".join(str(text) for text in texts)


def unused_in(row: Row) -> Iterator[str]:
    """What of a row is in none of its records: columns, and `messages[].key` for keys of its turns."""
    for name, value in row.items():
        if value is None or value in ("", [], {}):
            continue
        if name not in row.used:
            yield name
        elif isinstance(value, dict) and isinstance(one_of(value), str):  # other ways to say the answer
            if len(set(value.get("text", ()))) > 1:
                yield f"{name}.text[1:]"
            yield from (f"{name}.{key}" for key in value if key not in ("text", "answer_start", "value"))
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            keys: dict[str, None] = {}
            for item in value:
                if "role" in item or "from" in item:
                    keys.update(dict.fromkeys(unused_keys(item)))
                elif set(item) & set(_ANSWER_KEYS):
                    keys.update(dict.fromkeys(key for key in item if key not in (*_ANSWER_KEYS, *_SCORE_KEYS)))
            yield from (f"{name}[].{key}" for key in keys if name not in ("tools", "functions"))


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """The turns behind a system column's text, unless they begin with it."""
    row.join_parts(SYSTEMS)
    name = row.first(SYSTEMS)
    if not name:
        return messages
    system = row.take(name)
    if messages and messages[0]["role"] == "system" and messages[0]["content"].strip() == system.strip():
        return messages
    return [{"role": "system", "content": system}, *messages]


def with_history(messages: list[Message], row: Row, where: str) -> list[Message]:
    """The turns behind the earlier ones of a `history` column, after a system turn."""
    before = history_of(row, where)
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [*messages[:first], *before, *messages[first:]]


def history_of(row: Row, where: str) -> list[Message]:
    """Earlier turns, from [[question, answer], …] or a list of turns, both also as JSON, or from a transcript."""
    value = row.get(HISTORY)
    if value is None or value in ("", []):
        return []
    row.used.add(HISTORY)
    where = f"{where}: {HISTORY}"
    if is_transcript(value):
        return transcript_of(value, where)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, where)
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return messages_of(value, where) if value else []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        roles = ("user", "assistant")
        return [
            {"role": role, "content": text_of(text, f"{where}: exchange {number}")}
            for number, pair in enumerate(value, start=1)
            for role, text in zip(roles, pair, strict=True)
        ]
    raise DataError(
        f"{where} is {describe(value)}; expected earlier turns: [[question, answer], …] or a list of messages.",
        f"Write it so, or leave it out: data.columns='{{{HISTORY}: {UNUSED}}}'",
    )


def asked(row: Row, name: str, where: str) -> list[Message]:
    """The turns of a question: its column with what it is about and its choices, behind earlier turns and a system
    turn. The column may be a list of turns."""
    value = row.take(name)
    turns = side_of(value, "user", where) if isinstance(value, list) else [
        {"role": "user", "content": question_of(row, name, where)}
    ]  # fmt: skip
    if not isinstance(value, list) and not turns[0]["content"].strip():
        raise DataError(f"{where}: the prompt is empty.", "Remove the row, or write the prompt.")
    return with_system(with_history(turns, row, where) if name != HISTORY else turns, row)


def question_of(row: Row, name: str, where: str) -> str:
    """The text of a question's column with `input`, `context` and the choices of an answer.

    They go below it; a `context`, and a passage, goes above a `question` or `query`. Beside any other column an
    article is what somebody took the row from.
    """
    text = text_of(row.take(name), f"{where}: {name}")
    asks = name in ("question", "query", "problem")
    for given in GIVEN if asks else GIVEN[: -len(PASSAGES)]:
        about = _given(row, given, where) if given != name else ""
        if about and not (given in PASSAGES and about.strip() in text):
            above = given != "input" and asks
            text = "\n\n".join(part for part in ((about, text) if above else (text, about)) if part.strip())
    return _with_choices(text, row)


def _given(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if name != "input" and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)
    if name != "input" and not isinstance(value, str):
        return ""  # passages in a form of their own: not used, and told so
    if value is None:
        return ""
    row.used.add(name)
    text = text_of(value, f"{where}: {name}")
    return text if text.strip() else ""


def _with_choices(question: str, row: Row) -> str:
    choices = choices_of(row)
    if not choices:
        return question
    row.used.update(name for name in CHOICES if row.get(name) == row[choices[0]])
    lines = choices[1]
    said = row.get("answer")
    labelled = (
        bool(row.get(ANSWER_KEY)) or isinstance(said, int) or said in [f"{label}. {text}" for label, text in lines]
    )
    listed = [rf"{re.escape(label)}\W+{re.escape(text)}" if labelled else re.escape(text) for label, text in lines]
    if all(re.search(line, question) for line in listed):
        return question
    return question + "\n" + "\n".join(f"{label}. {text}" if label else text for label, text in lines)


def choices_of(row: Row) -> tuple[str, list[tuple[str, str]]] | None:
    """(column, [(label, text)]) of the answers that a question offers; a text is one of them, without a label."""
    name = next((name for name in CHOICES if row.get(name)), "")
    value = row.get(name)
    if isinstance(value, str):
        return (name, [("", value.strip("\n"))]) if value.strip() else None
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("label")
        if texts is None and all(isinstance(text, str) for text in value.values()):
            labels, texts = list(value), list(value.values())
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        texts = [item.get("text") for item in value]
        labels = [next((item[key] for key in ("label", "key", "id") if key in item), None) for item in value]
    else:
        texts, labels = value, None
    if not isinstance(texts, list) or not all(isinstance(text, str | int | float) for text in texts) or not texts:
        return None
    if not isinstance(labels, list) or len(labels) != len(texts) or None in labels:
        labels = [chr(ord("A") + number) if len(texts) <= 26 else str(number + 1) for number in range(len(texts))]
        marked = [re.match(rf"\(?{label}[).:]\s*(?=\S)", str(text)) for label, text in zip(labels, texts, strict=True)]
        if all(marked):  # AQuA's "A)21"
            texts = [text[found.end() :] for text, found in zip(texts, marked, strict=True) if found]
    return name, [(str(label), str(text)) for label, text in zip(labels, texts, strict=True)]


def answer_of(row: Row, name: str, where: str) -> str:
    """The text of an answer's column; a number is the place of a choice, from 0."""
    value = one_of(row.take(name))
    choices = choices_of(row)
    if isinstance(value, int) and not isinstance(value, bool):
        if choices and choices[1][0][0] and 0 <= value < len(choices[1]):
            label, text = choices[1][value]
            return f"{label}. {text}"
    elif name == ANSWER_KEY and choices and isinstance(value, str) and value.strip():
        found = next((choice for choice in choices[1] if choice[0] == value.strip()), None)
        if found is None:
            labels = ", ".join(label for label, _ in choices[1])
            raise DataError(f"{where}: {name} is {value!r}; the choices are {labels}.", "Write the label of one.")
        return f"{found[0]}. {found[1]}"
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        raise DataError(
            f"{where}: {name} is a list of {len(value)} texts, which does not say whether one answer is all of them or "
            "any of them.",
            "Write one text a row.",
        )
    return text_of(value, f"{where}: {name}")


def one_of(answer: Any) -> Any:
    """The text of an answer that is written in more ways than one: SQuAD's {text: [...], answer_start}, of which each
    text is right, TriviaQA's {value, aliases}, and a list of equal texts; "" where none is told. Any other answer as it
    is."""
    if isinstance(answer, dict) and isinstance(answer.get("value"), str) and isinstance(answer.get("aliases"), list):
        return answer["value"] if answer["value"] != "<unk>" else ""
    if isinstance(answer, dict) and isinstance(answer.get("text"), list) and "answer_start" in answer:
        return next((text for text in answer["text"] if isinstance(text, str)), "")
    if isinstance(answer, list) and answer and all(isinstance(text, str) for text in answer):
        return answer[0] if len({text.strip() for text in answer}) == 1 else answer
    return answer


def with_thought(messages: list[Message], row: Row) -> list[Message]:
    """The turns with the thought of a column in the last answer, where that has none of its own."""
    name = row.first(THOUGHT_COLUMNS)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if not name or last < 0 or messages[last].get(THOUGHTS[0]) or "</think>" in messages[last]["content"]:
        return messages
    return [*messages[:last], {**messages[last], THOUGHTS[0]: row.take(name)}, *messages[last + 1 :]]
