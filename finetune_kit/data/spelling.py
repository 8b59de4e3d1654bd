"""What other people call our columns: names in another case, names of known data sets and of other tools.

Only what is unambiguous is taken for ours; a name that is there already is never displaced. `data.columns` comes first.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from finetune_kit.data.messages import is_turn

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
LETTERS = "ABCDEFGHIJ"  # columns that are the choices of a question, as in C-Eval
LIKED = ("kto_tag", "thumbs_up", "liked", "is_liked", "desirable", "is_desirable")  # LLaMA-Factory's, and others'
TURNS = ("dialog", "dialogue", "turns")  # only where they are lists of turns: elsewhere they are texts


def opened(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose columns have their meaning by one another, or inside an object, with each as a column of ours; any
    other row as it is."""
    given = row.get("input")
    if isinstance(given, dict) and isinstance(given.get("messages"), list) and "prompt" not in row:
        return _inside(row, "input", {"messages": "prompt", "tools": "tools"})  # OpenAI's preference files
    asked = row.get("question")
    if isinstance(asked, dict) and isinstance(asked.get("full_text"), str):  # WebGPT's comparisons
        return _inside(row, "question", {"full_text": "question"})
    if isinstance(row.get("ctx"), str) and isinstance(row.get("endings"), list) and "prompt" not in row:  # HellaSwag
        label = str(row.get("label") if row.get("label") is not None else "").strip()
        answer = int(label) if label.isdecimal() and int(label) < len(row["endings"]) else label
        rest = {name: value for name, value in row.items() if name not in ("ctx", "endings", "label")}
        return {**rest, "prompt": row["ctx"], "choices": row["endings"], "answer": answer}
    letters = [letter for letter in LETTERS if isinstance(row.get(letter), str)]
    if len(letters) > 2 and letters == list(LETTERS[: len(letters)]) and not row.keys() & {"choices", "options"}:
        rest = {name: value for name, value in row.items() if name not in letters}
        return {**rest, "choices": {letter: row[letter] for letter in letters}}
    return row


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
