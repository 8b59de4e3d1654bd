"""Records to token columns, every record booked in the ledger as trained, truncated or dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_kit.config import DataConfig
from finetune_kit.data.chat import Sample, render_prompt, samples_of, truncate, untrainable
from finetune_kit.data.ledger import Ledger
from finetune_kit.data.records import PromptCompletion, Record, Text, prompt_of
from finetune_kit.errors import DataError


@dataclass
class Tokens:
    """One split. `columns`: name -> one int32 array a sample (4 bytes a token), and `row`, an index into `records`.

    `records`: those of which something is kept. `ends`: ids that end an answer.
    """

    columns: dict[str, list[Any]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)


@dataclass
class _Needs:
    """The smallest max_length that keeps a supervised token of any row, and the one that cuts no row."""

    smallest: int = 0
    whole: int = 0


def supervised(records: list[Record], split: str, config: DataConfig, tokenizer: Any, ledger: Ledger) -> Tokens:
    """Columns input_ids, labels (-100 where unsupervised) and row of conversations or text.

    Raises DataError where max_length leaves no supervised token in any row, or a row breaks an invariant of the masks.
    """
    import numpy as np

    tokens, needs = Tokens({"input_ids": [], "labels": [], "row": []}), _Needs()
    for record in records:
        assert isinstance(record, PromptCompletion | Text)
        kept = _kept(record, split, config, tokenizer, ledger, tokens.ends, needs)
        for sample in kept:
            tokens.columns["input_ids"].append(np.asarray(sample.input_ids, dtype=np.int32))
            tokens.columns["labels"].append(np.asarray(sample.labels, dtype=np.int32))
            tokens.columns["row"].append(len(tokens.records))
        if kept:
            tokens.records.append(record)
    if needs.smallest and not tokens.records:
        raise DataError(
            f"No supervised token is left in any {split.replace('_', '-')} row at data.max_length={config.max_length}.",
            f"data.max_length={needs.smallest} is the smallest that keeps one row; {needs.whole} keeps all rows whole.",
        )
    return tokens


def prompts(records: list[Record], split: str, config: DataConfig, tokenizer: Any, ledger: Ledger) -> Tokens:
    """Columns prompt_ids and row of prompts, pairs or labelled answers."""
    import numpy as np

    tokens = Tokens({"prompt_ids": [], "row": list(range(len(records)))}, records)
    for record in records:
        assert not isinstance(record, Text)
        ids = render_prompt(tokenizer, prompt_of(record), record.tools, config.chat_template_kwargs)
        tokens.columns["prompt_ids"].append(np.asarray(ids, dtype=np.int32))
    counts = ledger.splits[split]
    counts.trained = counts.samples = len(records)
    counts.tokens = sum(len(ids) for ids in tokens.columns["prompt_ids"])
    return tokens


def _kept(
    record: PromptCompletion | Text,
    split: str,
    config: DataConfig,
    tokenizer: Any,
    ledger: Ledger,
    ends: set[int],
    needs: _Needs,
) -> list[Sample]:
    """The record's samples within max_length, booked."""
    counts = ledger.splits[split]
    reason = untrainable(record.messages, config.train_on) if isinstance(record, PromptCompletion) else ""
    whole = [] if reason else samples_of(record, tokenizer, config, ledger.note)
    if not whole:
        ledger.drop(split, record.where, reason or "empty text")
        return []
    if isinstance(record, PromptCompletion):
        ends.update(sample.input_ids[stop - 1] for sample in whole for _, stop in sample.turns)
    first = min(sample.turns[0][0] + 1 for sample in whole)
    needs.smallest = min(needs.smallest or first, first)
    needs.whole = max(needs.whole, *(len(sample.input_ids) for sample in whole))
    kept = [cut for sample in whole if (cut := truncate(sample, config.max_length)) is not None]
    if not kept:
        ledger.drop(split, record.where, f"no supervised token at max_length={config.max_length}", f" (needs {first})")
        return []
    lost = sum(len(sample.input_ids) for sample in whole) - sum(len(sample.input_ids) for sample in kept)
    if lost:
        ledger.truncate(split, record.where, lost)
    else:
        counts.trained += 1
    counts.samples += len(kept)
    counts.tokens += sum(len(sample.input_ids) for sample in kept)
    counts.supervised_tokens += sum(stop - start for sample in kept for start, stop in sample.turns)
    return kept
