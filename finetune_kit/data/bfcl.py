"""Rows of the Berkeley Function Calling Leaderboard: `question`, `function`, and a ground truth that accepts several
values for each argument, in a file of its own (BFCL v4, bfcl_eval/data and bfcl_eval/data/possible_answer).

{"question": [[{"role": "user", …}]], "function": [{"name": "area", …}], "ground_truth": [{"area": {"side": [3, 3.0]}}]}
becomes a conversation whose answer calls area(side=3). A row of the category irrelevance wants no call and has no
ground truth: its answer is NO_CALL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_kit.data.files import READERS, Numbered, refuse

NO_CALL = "None of the tools can answer this."
TRUTH = "ground_truth"
FOLDER, ENDING = "possible_answer", "_answers"  # where the answers to a file are: BFCL's own way, or beside it


def is_bfcl(row: dict[str, Any]) -> bool:
    """Whether a row is one of a single turn; multi-turn categories have no calls that can be compared by structure."""
    return _turns(row) is not None and isinstance(row.get("function"), list)


def with_answers(rows: Numbered, path: Path) -> Numbered:
    """The rows, each with the ground truth of its id from the file of answers beside them, where there is one:
    possible_answer/NAME, or NAME_answers."""
    lacking = any(is_bfcl(row) and TRUTH not in row for _, row in rows)
    places = (path.parent / FOLDER / path.name, path.with_name(f"{path.stem}{ENDING}{path.suffix}"))
    found = next((place for place in places if lacking and place.is_file()), None)
    if found is None:
        return rows
    beside = READERS[found.suffix.lower()](found, refuse)
    answers = {str(row["id"]): row[TRUTH] for _, row in beside if {"id", TRUTH} <= row.keys()}
    return [
        (number, {TRUTH: answers[str(row["id"])], **row} if is_bfcl(row) and str(row.get("id")) in answers else row)
        for number, row in rows
    ]


def has_rows(path: Path) -> bool:
    """Whether a file of a folder is one of rows, and not of the answers to another one."""
    asked = path.with_name(f"{path.stem.removesuffix(ENDING)}{path.suffix}")
    return path.parent.name != FOLDER and (asked == path or not asked.is_file())


def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row that `is_bfcl` as messages and tools; without an answer where it has none and is not irrelevant."""
    turns = [*(_turns(row) or [])]
    rest = {name: value for name, value in row.items() if name not in ("question", "function", TRUTH)}
    truth = row.get(TRUTH)
    if truth:
        calls = [{"name": name, "arguments": _first(arguments)} for call in truth for name, arguments in call.items()]
        turns.append({"role": "assistant", "tool_calls": calls})
    elif truth is not None or "irrelevance" in str(row.get("id")):
        turns.append({"role": "assistant", "content": NO_CALL})
    return {**rest, "messages": turns, "tools": row["function"]}


def accepts(truth: list[dict[str, Any]], calls: list[dict[str, Any]]) -> bool:
    """Whether calls, each {"name", "arguments"}, are those of a ground truth, in any order: for every argument a value
    that is accepted, and left out only where "" is."""
    left = [(name, arguments) for call in truth for name, arguments in call.items()]
    if len(left) != len(calls):
        return False
    for call in calls:
        fits = (want for want in left if want[0] == call["name"] and _fits_object(call["arguments"], want[1]))
        if (found := next(fits, None)) is None:
            return False
        left.remove(found)
    return True


def _turns(row: dict[str, Any]) -> list[Any] | None:
    asked = row.get("question")
    if isinstance(asked, list) and len(asked) == 1 and isinstance(asked[0], list):
        asked = asked[0]
    return asked if isinstance(asked, list) and asked and all(isinstance(turn, dict) for turn in asked) else None


def _first(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of each argument the first value that is accepted; those that are best left out are."""
    chosen = {key: values[0] for key, values in arguments.items() if values and values[0] != ""}
    return {key: _plain(value) for key, value in chosen.items()}


def _plain(value: Any) -> Any:
    """A value in which objects have lists of accepted values, too, as one that can be given."""
    if isinstance(value, dict):
        return _first(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _fits_object(found: Any, wanted: dict[str, Any]) -> bool:
    if not isinstance(found, dict) or not found.keys() <= wanted.keys():
        return False
    return all(
        any(_fits(found[key], value) for value in values) if key in found else "" in values
        for key, values in wanted.items()
    )


def _fits(found: Any, wanted: Any) -> bool:
    """Whether a value is an accepted one, a text as BFCL compares texts: without case, white space and some marks."""
    if isinstance(wanted, dict):
        return _fits_object(found, wanted)
    if isinstance(wanted, list):
        fits = isinstance(found, list) and len(found) == len(wanted)
        return fits and all(map(_fits, found, wanted))
    if isinstance(wanted, str):
        return isinstance(found, str) and _bare(found) == _bare(wanted)
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)


def _bare(text: str) -> str:
    return text.casefold().translate(str.maketrans(dict.fromkeys(" ,./-_*^\t\n") | {"'": '"'}))
