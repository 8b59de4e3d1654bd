"""The layout of rows, found by looking at the columns, never by registration; to_records.py converts them.

Where several formats fit, the first of `FORMATS` whose kind the recipe can use is taken. The order goes from the most
telling columns to the least: preference pairs, then labelled answers, lists of turns, instructions, pairs of strings,
plain text, prompts alone. `data.columns` renames before anything is looked at.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_kit.data import preferences
from finetune_kit.data.columns import (
    NAMES,
    UNUSED,
    Row,
)
from finetune_kit.data.messages import (
    is_transcript,
)
from finetune_kit.data.records import (
    Record,
)
from finetune_kit.data.to_records import (
    PAIRS,
    QUESTIONS,
    TOOLS,
    TURN_COLUMNS,
    from_instances,
    from_labels,
    from_pair,
    from_prompt,
    from_text,
    from_transcript,
    from_turns,
    pair_of,
    truth,
)
from finetune_kit.errors import DataError, SettingsError

NAMES_WE_KNOW = sorted(
    {name for pair in PAIRS for name in pair}
    | {*QUESTIONS, *TURN_COLUMNS, "chosen", "rejected", "label", "margin", "instances", *TOOLS, "text", *NAMES}
    | {"responses", "scores", "ranks", "response_a", "response_b", "votes", "score_chosen", "score_rejected"}
)
UNDERSTOOD = {*NAMES_WE_KNOW, *preferences.NAMES}


@dataclass(frozen=True)
class Format:
    """A name for people, the kind of record it gives, whether columns and a first row fit, and the conversion.

    `ranked`: the conversion gives all pairs of a row, the best against the worst first.
    """

    name: str
    kind: str
    fits: Callable[[set[str], dict[str, Any]], bool]
    convert: Callable[[Row, str], list[Record]]
    ranked: bool = False


# what a recipe takes besides rows of its own kind: plain text, conversations without their last answer, and pairs, each
# of which is a liked and a disliked answer
ACCEPTED = {
    "prompt_completion": ("prompt_completion", "text"),
    "prompt": ("prompt", "prompt_completion", "preference"),
    "labelled_completion": ("labelled_completion", "preference"),
}


def recognise(
    columns: set[str], first: dict[str, Any], kind: str, where: str, theirs: dict[str, str] | None = None
) -> Format:
    """The format of a source from its column names and a row. Raises DataError where none gives records of `kind`.

    `theirs`: our name -> the source's own, where that is another one.
    """
    names, theirs = columns, theirs or {}
    columns = columns - {"label"} if kind == "prompt" else columns  # no answer is trained
    fitting = [item for item in FORMATS if item.fits(columns, first)]
    for item in fitting:
        if item.kind in ACCEPTED.get(kind, (kind,)):
            return item
    found = f"columns {', '.join(sorted(theirs.get(name, name) for name in names))}"
    score = next((name for name in preferences.SCORED_ALONE if preferences.is_number(first.get(name))), "")
    if score and kind == "labelled_completion" and pair_of(columns):
        name = theirs.get(score, score)
        raise DataError(
            f"{where}: {name} is a number on a scale, such as {first[score]}, and no word of liking.",
            f"Of 0 and 1 alone: data.columns='{{{name}: label}}'. Else write a label: true where it is high enough.",
        )
    if fitting and fitting[0].kind == "labelled_completion" and kind == "prompt_completion":
        label = theirs.get("label", "label")
        raise DataError(
            f"{where}: found {found}, which look like {fitting[0].name}: {label} says which answers were liked.",
            f"Learn from both: run kto. Or train on all of them alike: data.columns='{{{label}: unused}}'",
        )
    looks = f", which look like {fitting[0].name} ({fitting[0].kind})" if fitting else ""
    expected = "; ".join(f"{item.name}" for item in FORMATS if item.kind in ACCEPTED.get(kind, (kind,)))
    raise DataError(
        f"{where}: found {found}{looks}; this recipe needs {kind.replace('_', '-')} rows: {expected}.",
        f"Say what your columns are, with their names on the left: data.columns='{{{_EXAMPLE[kind]}}}'",
    )


def layout_of(row: Row, kind: str) -> Format | None:
    """The format that one row's own columns have, among those that `kind` takes; of another kind where they say so."""
    columns = {name for name, value in row.items() if value is not None and (name != "label" or kind != "prompt")}
    fitting = [item for item in FORMATS if item.fits(columns, row)]
    own = [item for item in fitting if item.kind in ACCEPTED.get(kind, (kind,))]
    # a question whose answer is missing is not a prompt of its own
    return next((item for item in [*own, *fitting] if item.kind != "prompt" or kind == "prompt"), None)


def layouts_of(rows: list[Row], kind: str, where: str, theirs: dict[str, str]) -> tuple[Format, list[Format | None]]:
    """(the format that most rows of a source have, the format of each row). Raises as `recognise`."""
    each = [layout_of(row, kind) for row in rows]
    fitting = Counter(item for item in each if item is not None and item.kind in ACCEPTED.get(kind, (kind,)))
    if fitting:
        return fitting.most_common(1)[0][0], each
    columns = {name for row in rows for name, value in row.items() if value is not None}
    first = {name: next(row[name] for row in rows if row.get(name) is not None) for name in columns}
    return recognise(columns, first, kind, where, theirs), each


def as_lists(rows: list[tuple[int, Row]], kind: str) -> list[tuple[int, Row]]:
    """For a recipe that takes pairs, rows of one scored answer each as rows of all answers to a prompt."""
    taken = ACCEPTED.get(kind, (kind,))
    layouts = [layout_of(row, kind) for _, row in rows]
    if "preference" not in taken or kind == "prompt" or any(item and item.kind in taken for item in layouts):
        return rows
    names = pair_of({name for _, row in rows for name, value in row.items() if value is not None})
    gathered = preferences.gathered(rows, *names) if names else rows
    # for KTO a score is not a word of liking; where it orders several answers to a prompt, the order says it
    return rows if kind == "labelled_completion" and len(gathered) == len(rows) else gathered


def check_layout(row: Row, own: Format | None, found: Format, where: str, other: tuple[str, Row]) -> None:
    """Raises DataError for a row of another format than `found`, which the source has; `other`: a row that has it, and
    its place."""
    have, has = ({name for name, value in some.items() if value is not None} for some in (other[1], row))
    pair = pair_of(set(row)) if found.convert is from_pair and not row.waits else None
    if own is None or own is found:
        if pair and has - have and not has.issuperset(pair):
            lacks = ", ".join(name for name in pair if name not in has)
            raise DataError(
                f"{where} has no {lacks}, as {other[0]} has; it has {', '.join(sorted(has))}.",
                "Give all rows of a file the same columns.",
            )
        return
    # one text of many that looks like a transcript is a text, and a question is a prompt with an answer and without
    alike = ({from_text, from_transcript}, {from_pair, from_prompt})
    if {own.convert, found.convert} in alike and found.convert is not from_transcript:
        return
    if has == have and found.kind != "prompt_completion":
        return  # its values are what is wrong, which the conversion says
    differs = [("", has - have), ("no ", have - has)]
    parts = [f"{no}{', '.join(sorted(names))}" for no, names in differs if names]
    more = f" It has {', and '.join(parts)}." if parts else ""
    raise DataError(
        f"{where}: another layout than that of {other[0]}: {own.name}, and not {found.name}.{more}",
        "Keep rows of one layout in a file; data.path=[a.jsonl, b.jsonl] reads several.",
    )


_EXAMPLE = {
    "prompt_completion": "my_question: prompt, my_answer: completion",
    "prompt": "my_question: prompt",
    "text": "my_column: text",
    "preference": "my_question: prompt, the_better: chosen, the_worse: rejected",
    "labelled_completion": "my_question: prompt, my_answer: completion, is_good: label",
}


def rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under our names, without the columns that are `displaced`."""
    if not columns:
        return row
    return {columns.get(name, name): value for name, value in row.items() if name not in displaced(row, columns)}


def displaced(row: dict[str, Any], columns: dict[str, str]) -> set[str]:
    """The columns that `rename` leaves out: called unused, or named as another one is to be."""
    taken = set(columns.values())
    return {name for name in row if columns.get(name) == UNUSED or (name not in columns and name in taken)}


def check_columns(columns: dict[str, str], found: set[str], where: str) -> None:
    """Raises SettingsError where `data.columns` names a column that is not there, or no name of ours, or one twice."""
    for ours in columns.values():
        same = [theirs for theirs, name in columns.items() if name == ours]
        if len(same) > 1 and ours != UNUSED:
            raise SettingsError(
                f"data.columns: {' and '.join(same)} cannot both be {ours!r}.", f"Call one of them {UNUSED}."
            )
    for theirs, ours in columns.items():
        if theirs not in found:
            near = difflib.get_close_matches(theirs, found, n=1)
            raise SettingsError(
                f"data.columns: {where} has no column {theirs!r}; found {', '.join(sorted(found))}.",
                f"Did you mean {near[0]}?" if near else "Name a column of the data on the left of each colon.",
            )
        if ours not in UNDERSTOOD:
            near = difflib.get_close_matches(ours, NAMES_WE_KNOW, n=1)
            raise SettingsError(
                f"data.columns: {theirs} cannot be {ours!r}." + (f" Did you mean {near[0]}?" if near else ""),
                f"Names: {', '.join(NAMES_WE_KNOW)}.",
            )


def _is_labelled(columns: set[str], row: dict[str, Any]) -> bool:
    return (
        "label" in columns
        and truth(row.get("label")) is not None
        and bool(pair_of(columns) or columns & set(TURN_COLUMNS))
    )


FORMATS = (
    Format(
        "preference (chosen, rejected; prompt)",
        "preference",
        lambda c, r: {"chosen", "rejected"} <= c,
        preferences.preference,
    ),
    Format(
        "an answer and a worse one in a list (instruction, output: [good, bad])",
        "preference",
        lambda c, r: preferences.two_in_a_list(c, r),
        preferences.first_of_two,
    ),
    Format(
        "scored or ranked answers (prompt, responses, scores)",
        "preference",
        lambda c, r: preferences.list_of(c, r) is not None,
        preferences.ranked,
        ranked=True,
    ),
    Format(
        "two answers and votes (prompt, response_a, response_b, votes)",
        "preference",
        lambda c, r: preferences.answers_of(c) is not None,
        preferences.voted,
    ),
    Format(
        "labelled completions (prompt, completion, label)",
        "labelled_completion",
        _is_labelled,
        from_labels,
    ),
    # A truth value beside an answer says whether it was liked: training on all of them would teach the bad ones.
    Format(
        "messages (or conversations)",
        "prompt_completion",
        lambda c, r: bool(c & set(TURN_COLUMNS)) and not _is_labelled(c, r),
        from_turns,
    ),
    Format(
        "self-instruct (instruction, instances)",
        "prompt_completion",
        lambda c, r: {"instruction", "instances"} <= c,
        from_instances,
    ),
    Format(
        "prompt and completion (or question and answer, instruction and output, …)",
        "prompt_completion",
        lambda c, r: pair_of(c) is not None and not _is_labelled(c, r),
        from_pair,
    ),
    Format(
        "transcripts (text with Human: and Assistant:)",
        "prompt_completion",
        lambda c, r: "text" in c and is_transcript(r.get("text")),
        from_transcript,
    ),
    Format("plain text (text)", "text", lambda c, r: "text" in c, from_text),
    Format(
        "prompts (prompt)",
        "prompt",
        lambda c, r: bool(c & set(QUESTIONS)),
        from_prompt,
    ),
)
