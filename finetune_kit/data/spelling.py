"""What other people call our columns: names in another case, names of known data sets and of other tools.

Only what is unambiguous is taken for ours; a name that is there already is never displaced. `data.columns` comes first.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import takewhile
from typing import Any

from finetune_kit.data.bfcl import as_conversation, is_bfcl
from finetune_kit.data.columns import ANSWER_KEY
from finetune_kit.data.messages import is_turn
from finetune_kit.errors import DataError

# (better, worse) of a pair: OpenAI's preference files, and names that data sets on the Hub use
PAIRED = (
    ("preferred_output", "non_preferred_output"),
    ("chosen_response", "rejected_response"),
    ("chosen_answer", "rejected_answer"),
    ("chosen_output", "rejected_output"),
    ("preferred", "dispreferred"),
    ("preferred", "non_preferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("better_response", "worse_response"),
    ("preferred_response", "rejected_response"),
    ("preferred_response", "dispreferred_response"),
    ("preferred_response", "non_preferred_response"),
    ("accepted_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("win", "lose"),
    ("winner", "loser"),
    ("winning", "losing"),
    ("good", "bad"),
    ("accept", "reject"),
    ("edited_response", "original_response"),  # what a person made of an answer, as in HelpSteer3
    ("response_j", "response_k"),  # stack-exchange-paired: j has more votes
    ("y_w", "y_l"),
)
Apart = tuple[str, tuple[str, ...], str, int | None]
QUESTIONS = ("question", "query", "problem", "prompt", "instruction")
LETTERS = "ABCDEFGHIJ"  # columns that are the choices of a question, as in C-Eval; also option_a, optionB, …
ONE_EACH = ("option", "choice")  # and a letter or a number: columns that are a choice each
# (question, choices, what says which is right, its number for the first; None: that differs from file to file)
CHOICES_APART = (
    ("goal", ("sol1", "sol2"), "label", 0),  # PIQA
    ("sentence", ("option1", "option2"), "answer", 1),  # WinoGrande
    ("question", ("opa", "opb", "opc", "opd"), "cop", None),  # MedMCQA: 0 on the Hub, 1 in its first files
)
LIKED = ("kto_tag", "thumbs_up", "liked", "is_liked", "desirable", "is_desirable")  # LLaMA-Factory's, and others'
TURNS = ("dialog", "dialogue", "turns")  # only where they are lists of turns: elsewhere they are texts


def opened(rows: list[tuple[int, dict[str, Any]]], where: str) -> list[tuple[int, dict[str, Any]]]:
    """Rows whose columns have their meaning by one another, or inside an object, with each as a column of ours; any
    other row as it is. Raises DataError where a number does not say which choice it means."""
    return _choices_joined([(number, _opened(row)) for number, row in rows], where)


def _opened(row: dict[str, Any]) -> dict[str, Any]:
    if is_bfcl(row):
        return as_conversation(row)
    given = row.get("input")
    if isinstance(given, dict) and isinstance(given.get("messages"), list) and "prompt" not in row:
        return _inside(row, "input", {"messages": "prompt", "tools": "tools"})  # OpenAI's preference files
    asked = row.get("question")
    if isinstance(asked, dict) and isinstance(asked.get("full_text"), str):  # WebGPT's comparisons
        return _inside(row, "question", {"full_text": "question"})
    if isinstance(asked, str) and isinstance(row.get("passage"), str) and isinstance(row.get("answer"), bool):  # BoolQ
        return {**row, "answer": "yes" if row["answer"] else "no"}
    if isinstance(row.get("ctx"), str) and isinstance(row.get("endings"), list) and "prompt" not in row:  # HellaSwag
        label = str(row.get("label") if row.get("label") is not None else "").strip()
        answer = int(label) if label.isdecimal() and int(label) < len(row["endings"]) else label
        rest = {name: value for name, value in row.items() if name not in ("ctx", "endings", "label")}
        return {**rest, "prompt": row["ctx"], "choices": row["endings"], "answer": answer}
    if row.keys() & {"choices", "options"}:
        right = row.get("correct")
        if isinstance(right, str) and len(right) == 1 and right in LETTERS and "answer" not in row:  # AQuA
            return {**{name: value for name, value in row.items() if name != "correct"}, ANSWER_KEY: right}
        return row
    names = {letter: letter for letter in LETTERS if isinstance(row.get(letter), str)}
    if len(names) < 3:
        joined = _joined(row)
        names = next((found for stem in ONE_EACH if len(found := _run(joined, stem, LETTERS.lower())) > 1), {})
    if names and list(names) == list(LETTERS[: len(names)]):
        rest = {name: value for name, value in row.items() if name not in names.values()}
        return {**rest, "choices": {letter: row[name] for letter, name in names.items()}}
    return row


def _joined(row: dict[str, Any]) -> dict[str, str]:
    """optiona -> the name of each column of text, such as option_a, optionA or `Option A`."""
    return {re.sub(r"[\s_-]+", "", name).lower(): name for name, value in row.items() if isinstance(value, str)}


def _run(joined: dict[str, str], stem: str, signs: str) -> dict[str, str]:
    """A, B, … or 1, 2, … -> the columns `stem` with it, up to the first that is not there."""
    there = takewhile(lambda sign: stem + sign in joined, signs)
    return {sign.upper(): joined[stem + sign] for sign in there}


def _choices_joined(rows: list[tuple[int, dict[str, Any]]], where: str) -> list[tuple[int, dict[str, Any]]]:
    """Rows whose numbered choices are a column each with all in one column, and the place of the right one from 0."""
    apart = {number: found for number, row in rows if (found := _apart(row))}
    places = {_place(row.get(apart[number][2])) for number, row in rows if number in apart} - {None}
    most = max((len(found[1]) for found in apart.values()), default=0)
    shown = {0: {0, most} & places == {0}, 1: {0, most} & places == {most}}
    seen = next((first for first, is_so in shown.items() if is_so), None)
    return [
        (number, _join(row, apart[number], seen, f"{where}:{number}") if number in apart else row)
        for number, row in rows
    ]


def _join(row: dict[str, Any], apart: Apart, seen: int | None, where: str) -> dict[str, Any]:
    question, columns, answer, first = apart
    first = seen if first is None else first
    said = row.get(answer)
    place = _place(said)
    if place is not None and first is None:
        raise DataError(
            f"{where}: {answer} is {place}, and nothing in the file says whether {columns[0]} is 0 or 1.",
            f"Write the right choice as text, in a column answer, and leave the number out: "
            f"data.columns='{{{answer}: unused}}'",
        )
    if place == -1:
        said = ""  # it is not told, as in files to be tested on
    elif place is not None:
        said = place - (first or 0)
        if not 0 <= said < len(columns):
            raise DataError(
                f"{where}: {answer} is {place}, and there are {len(columns)} choices, from {first}.",
                f"Write the number of one: {columns[0]} is {first}.",
            )
    rest = {name: value for name, value in row.items() if name not in (question, answer, *columns)}
    asked = question if question in QUESTIONS else "prompt"
    return {**rest, asked: row[question], "choices": [row[name] for name in columns], "answer": said}


def _apart(row: dict[str, Any]) -> Apart | None:
    """What of a row is a question, its numbered choices and the right one's number."""
    if row.keys() & {"choices", "options"}:
        return None
    texts = {name for name, value in row.items() if isinstance(value, str)}
    for found in CHOICES_APART:
        if {found[0], *found[1]} <= texts and found[2] in row:
            return found
    question = next((name for name in QUESTIONS if name in texts), "")
    for stem in ONE_EACH:
        columns = tuple(_run(_joined(row), stem, "123456789").values())
        if question and len(columns) > 1 and "answer" in row:
            return question, columns, "answer", None
    return None


def _place(value: Any) -> int | None:
    """The number of a choice, -1 where none is told; None for a text."""
    if value is None or value == "":
        return -1
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,2}", value.strip()) else None


def _inside(row: dict[str, Any], column: str, known: dict[str, str]) -> dict[str, Any]:
    """The row with what the object in a column holds as columns; those not `known` are named column.key."""
    inside = {known.get(name, f"{column}.{name}"): value for name, value in row[column].items()}
    return {**{name: value for name, value in row.items() if name != column}, **inside}


def spelling(rows: list[tuple[int, dict[str, Any]]], known: set[str]) -> dict[str, str]:
    """Their name -> ours for the columns of a source's rows; `known`: all of ours."""
    sample: dict[str, Any] = {}
    for _, row in rows:
        sample |= {name: value for name, value in row.items() if sample.get(name) is None}
    columns = {name for name, value in sample.items() if value is not None}
    ours: dict[str, str] = {}
    plain = {name: _plain(name, known) for name in columns if name not in known}
    times = Counter(plain.values())
    for name, meant in plain.items():
        if meant != name and meant in known and meant not in columns and times[meant] == 1:
            ours[name] = meant
    present = {ours.get(name, name): name for name in columns}
    for pair in PAIRED:
        taken = {"chosen", "rejected"}.difference(pair)
        if {*pair} <= present.keys() and not taken & present.keys():
            _call(present, ours, pair[0], "chosen")
            _call(present, ours, pair[1], "rejected")
    if "label" not in present and (name := next((name for name in LIKED if name in present), "")):
        _call(present, ours, name, "label")
    if not present.keys() & {"messages", "conversations", "conversation", "chat"}:
        for name in TURNS:
            value = sample.get(present.get(name, name))
            if name in present and isinstance(value, list) and value and all(map(is_turn, value)):
                _call(present, ours, name, "messages")
                break
    return ours


def _plain(name: str, known: set[str]) -> str:
    """A name in our spelling: `Best Answer`, `best-answer` and `bestAnswer` are best_answer."""
    words = re.sub(r"[\s-]+", "_", name.strip())
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", words).lower()
    return parted if parted in known else words.lower()


def _call(present: dict[str, str], ours: dict[str, str], name: str, meant: str) -> None:
    if name != meant:
        ours[present.pop(name)] = meant
        present[meant] = name
