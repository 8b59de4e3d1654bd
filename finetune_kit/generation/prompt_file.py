"""A file of prompts and the file of their answers: JSONL in, JSONL out, and what is answered is not asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_kit.data.columns import Row, asked, with_system
from finetune_kit.data.files import read_jsonl
from finetune_kit.data.messages import check_media, messages_of, tools_of
from finetune_kit.data.records import Message
from finetune_kit.errors import DataError, SettingsError

_EACH = ("completion", "ended", "tokens", "calls")
OURS = ("row", *_EACH, *(f"base_{name}" for name in _EACH), "made_with")
BEGINNING = b'{"row": '  # of every line that we write


@dataclass(frozen=True)
class Line:
    """One line of a prompt file: its number, its fields, and the conversation that they ask to be answered."""

    number: int
    fields: dict[str, Any]
    messages: list[Message]
    tools: list[dict[str, Any]] | None


def read_prompts(path: Path) -> list[Line]:
    """The file's lines. `prompt` is a string or a list of messages; `messages` is taken where both are there, and an
    assistant's turn at their end is the answer to produce, so it is not fed. Columns beside them (system, input,
    history, …) mean what they mean in training.

    Raises DataError with file and line for a line that is broken or asks nothing, SettingsError for no file.
    """
    if not path.is_file():
        raise SettingsError(f"--prompts {path}: no such file.", 'Expected one {"prompt": "…"} a line.')
    lines = [_line(number, row, f"{path}:{number}") for number, row in read_jsonl(path)]
    if not lines:
        raise DataError(f"{path}: no prompts.", 'Expected one {"prompt": "…"} a line.')
    return lines


def _line(number: int, row: dict[str, Any], where: str) -> Line:
    taken = [name for name in OURS if name in row]
    if taken:
        raise DataError(
            f"{where}: the field `{taken[0]}` is one that the answers are written with.",
            f"Rename it, such as to `{'reference' if taken[0] == 'completion' else 'old_' + taken[0]}`.",
        )
    if "prompt" not in row and "messages" not in row:
        found = ", ".join(row) or "no field"
        raise DataError(f"{where}: neither `prompt` nor `messages`; found {found}.", 'Expected {"prompt": "…"}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair, which is not a character.", "Fix the line.") from None
    check_media(row, where)
    columns = Row(row)
    asks = "messages" if "messages" in row else "prompt"
    if isinstance(row[asks], list):
        messages = messages_of(row[asks], where)
        messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        messages = with_system(messages, columns)
    else:
        messages = asked(columns, asks, where)
    if not any(message["content"].strip() for message in messages):
        raise DataError(f"{where}: an empty prompt.", "Remove the line, or write the prompt.")
    return Line(number, row, messages, tools_of(row.get("tools"), where))


def answered(lines: list[Line], output: Path, made_with: str) -> set[int]:
    """Numbers of the lines that `output` has an answer to. A last line that was not written to its end is cut off.

    `made_with` tells what makes the answers (model and settings). Raises DataError where the file holds anything but
    answers to these very lines by just that.
    """
    if not output.exists():
        return set()
    if output.is_dir():
        raise SettingsError(f"--output {output} is a folder.", f"Give a file, such as {output / 'answers.jsonl'}")
    content = output.read_bytes()
    whole, torn = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    other = f"Use another --output, or move {output} away."
    if torn and not (torn.startswith(BEGINNING) or BEGINNING.startswith(torn)):
        raise DataError(f"{output} holds something else than answers, and is not overwritten.", other)
    asked = {line.number: line.fields for line in lines}
    done: set[int] = set()
    for number, raw in enumerate(whole.splitlines(), start=1):
        row = _row(raw)
        if row is None:
            raise DataError(f"{output}:{number} was not written by this command, and is not overwritten.", other)
        fields = {name: value for name, value in row.items() if name not in OURS}
        if asked.get(row["row"]) != fields:
            raise DataError(f"{output}:{number} answers another prompt than line {row['row']} of the file.", other)
        if row["made_with"] != made_with:
            raise DataError(f"{output}:{number} was answered by another model, or with other settings.", other)
        done.add(row["row"])
    if torn:
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _row(raw: bytes) -> dict[str, Any] | None:
    """A line that we wrote, else None."""
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):  # broken JSON, or bytes that are no UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("row"), int) and "made_with" in row else None


def append_answers(
    lines: list[Line],
    done: set[int],
    output: Path,
    answer: Callable[[list[Line]], list[dict[str, Any]]],
    *,
    made_with: str,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Append the answers to the lines that are not `done`, in the order of the prompts, batch by batch.

    Each line: row (number in the prompt file), the prompt's own fields, what `answer` gives, made_with. A batch holds
    the same lines whether or not some are answered, so that a resumed file is that of an uninterrupted run.
    `progress` is told how many lines are answered.
    """
    done = set(done)
    output.parent.mkdir(parents=True, exist_ok=True)
    if progress is not None:
        progress(len(done))
    with output.open("ab") as file:
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            if all(line.number in done for line in batch):
                continue
            for line, fields in zip(batch, answer(batch), strict=True):
                if line.number not in done:
                    row = {"row": line.number, **line.fields, **fields, "made_with": made_with}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    done.add(line.number)
            file.flush()
            if progress is not None:
                progress(len(done))
