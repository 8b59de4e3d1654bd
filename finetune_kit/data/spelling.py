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
)
LIKED = ("kto_tag", "thumbs_up", "liked", "is_liked", "desirable", "is_desirable")  # LLaMA-Factory's, and others'
TURNS = ("dialog", "dialogue", "turns")  # only where they are lists of turns: elsewhere they are texts


def opened(row: dict[str, Any]) -> dict[str, Any]:
    """A row of OpenAI's preference files, whose `input` is an object with the messages and the tools, with these as
    columns; any other row as it is."""
    given = row.get("input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list) or "prompt" in row:
        return row
    known = {"messages": "prompt", "tools": "tools"}
    inside = {known.get(name, f"input.{name}"): value for name, value in given.items()}
    return {**{name: value for name, value in row.items() if name != "input"}, **inside}


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
