"""The account of every input row: trained whole, truncated, or dropped with its reason; the sums equal the input."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from finetune_kit.data.records import (
    LabelledCompletion,
    Message,
    Preference,
    Prompt,
    PromptCompletion,
    Record,
    Text,
    prompt_of,
    reference_of,
)
from finetune_kit.errors import DataError

REPEATED = "said by another held-out row"  # measured once; nothing is lost by it


@dataclass
class Counts:
    """Rows and tokens of one split. rows = trained + truncated + dropped; `trained` counts rows kept whole.

    On the held-out split "trained" rows are those scored whole. `tokens`, `supervised_tokens`: of what is kept;
    `truncated_tokens`: cut off by max_length.
    """

    rows: int = 0
    trained: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_tokens: int = 0

    @property
    def lost(self) -> int:
        return sum(self.dropped.values())


@dataclass
class Ledger:
    """Counts per split, every row that was not kept whole, and what was done otherwise than asked, in words.

    `listed`: {split, where, what}. `fingerprint`: sha256 of the content of all rows, in order. `unused_columns`: rows
    in which a column says something that becomes no part of a record, `messages[].key` a key of its turns.
    `special_tokens_in_text`: rows that hold a special token in their text, of `special_rows` in all;
    `mimicking_rows`: text like the template's own between two turns, where that is no token.
    """

    splits: dict[str, Counts] = field(default_factory=lambda: {"train": Counts(), "held_out": Counts()})
    listed: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    unused_columns: Counter[str] = field(default_factory=Counter)
    special_tokens_in_text: Counter[str] = field(default_factory=Counter)
    special_rows: int = 0
    mimicking_rows: int = 0

    @property
    def train(self) -> Counts:
        return self.splits["train"]

    @property
    def held_out(self) -> Counts:
        return self.splits["held_out"]

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)

    def drop(self, split: str, where: str, reason: str, detail: str = "") -> None:
        self.splits[split].dropped[reason] += 1
        self.listed.append({"split": split, "where": where, "what": f"dropped: {reason}{detail}"})

    def truncate(self, split: str, where: str, tokens: int) -> None:
        self.splits[split].truncated += 1
        self.splits[split].truncated_tokens += tokens
        self.listed.append({"split": split, "where": where, "what": f"truncated by {tokens} tokens"})

    def check(self, max_lost: float) -> None:
        """The sums hold (a bug of ours otherwise); DataError where a split lost more than `max_lost` of its rows."""
        for name, counts in self.splits.items():
            if counts.trained + counts.truncated + counts.lost != counts.rows:
                raise AssertionError(f"ledger of {name}: {counts} does not add up")
            lost = counts.lost - counts.dropped[REPEATED]
            if counts.rows and lost / counts.rows > max_lost:
                dropped = [(reason, count) for reason, count in counts.dropped.most_common() if reason != REPEATED]
                reasons = "; ".join(f"{count} × {reason}" for reason, count in dropped)
                known = tuple(f"dropped: {reason}" for reason, _ in dropped)
                first = next(item for item in self.listed if item["split"] == name and item["what"].startswith(known))
                enough = -(-lost * 100 // counts.rows) / 100
                remedy = "Raise data.max_length" if "max_length" in reasons else "Fix the rows"
                raise DataError(
                    f"{lost} of {counts.rows} {name.replace('_', '-')} rows would be lost "
                    f"({lost / counts.rows:.0%}, allowed {max_lost:.0%}): {reasons}. First: {first['where']}.",
                    remedy + (f", or allow it: data.max_lost={enough:.2f}" if enough < 1 else "."),
                )

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: {**asdict(counts), "dropped": dict(counts.dropped)} for name, counts in self.splits.items()},
            "unused_columns": dict(self.unused_columns),
            "special_tokens_in_text": {"rows": self.special_rows, "tokens": dict(self.special_tokens_in_text)},
            "rows_like_turns": self.mimicking_rows,
            "notes": self.notes,
            "fingerprint": self.fingerprint,
            "rows_not_kept_whole": self.listed,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote."""
        names = ("train", "held_out")
        special = content["special_tokens_in_text"]
        return cls(
            splits={name: Counts(**{**content[name], "dropped": Counter(content[name]["dropped"])}) for name in names},
            listed=content["rows_not_kept_whole"],
            notes=content["notes"],
            fingerprint=content["fingerprint"],
            unused_columns=Counter(content["unused_columns"]),
            special_tokens_in_text=Counter(special["tokens"]),
            special_rows=special["rows"],
            mimicking_rows=content["rows_like_turns"],
        )


def content_of(record: Record) -> str:
    """A record's content as canonical JSON: equal for equal rows, wherever they came from."""
    content = {item.name: getattr(record, item.name) for item in fields(record)}
    # rewards judge by a prompt's other columns; a task's are made anew from its question
    judged = isinstance(record, Prompt) and not record.where.startswith("reasoning_gym/")
    for name in ("where", "as_strings", "defect", *([] if judged else ["metadata"])):
        content.pop(name, None)
    # a column store has dates, numbers of other kinds and bytes; what has no text of its own is known by its type
    texts = (date, time, timedelta, Decimal, bytes)
    return json.dumps(
        [type(record).__name__, content],
        sort_keys=True,
        ensure_ascii=False,
        default=lambda value: str(value) if isinstance(value, texts) else type(value).__name__,
    )


def fingerprint_of(records: Iterable[Record]) -> str:
    """sha256 over the content of records in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(content_of(record).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _said(turn: Message) -> str:
    calls = turn.get("tool_calls")
    return f"{turn['role']}\x1e{_plain(turn['content'])}\x1e{json.dumps(calls, sort_keys=True) if calls else 'null'}"


def content_key(messages: list[Message]) -> str:
    """Who said what, calls included, with white space and case taken out of account."""
    return "\x1f".join(map(_said, messages))


def digest(key: str) -> bytes:
    """A key's hash, 16 bytes: all that is kept of the keys of a set's rows."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def keys_of(record: Record) -> tuple[str, str, str]:
    """(prompt, same, answer), each equal for rows that have it in common.

    By the prompt rows must not sit on both sides of a split; by all that is said duplicates and overlap are judged; the
    (chosen) answer is "" where there is none.
    """
    if isinstance(record, Text):
        text = _plain(record.text)
        return text, text, ""
    answer = _plain(reference_of(record))
    if isinstance(record, PromptCompletion):
        said = list(map(_said, record.messages))
        return "\x1f".join(said[: len(prompt_of(record))]), "\x1f".join(said), answer
    prompt = content_key(prompt_of(record))
    if isinstance(record, Preference):
        return prompt, "\x1d".join([prompt, *map(content_key, (record.chosen, record.rejected))]), answer
    if isinstance(record, LabelledCompletion):
        return prompt, "\x1d".join([prompt, content_key(record.completion), str(record.label)]), answer
    return prompt, prompt, answer


def prompt_key(record: Record) -> str:
    """The first of `keys_of`."""
    return _plain(record.text) if isinstance(record, Text) else content_key(prompt_of(record))


def same_key(record: Record) -> str:
    """The second of `keys_of`."""
    return keys_of(record)[1]
