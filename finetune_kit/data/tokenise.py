"""Records to token columns, every record booked in the ledger as trained, truncated or dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from finetune_kit.data.chat import IGNORED, Sample, asking_prompt, asking_samples, truncate, untrainable
from finetune_kit.data.ledger import Ledger, content_key
from finetune_kit.data.records import (
    LabelledCompletion,
    Message,
    Preference,
    PromptCompletion,
    Record,
    Text,
    prompt_of,
)
from finetune_kit.data.special import plain_marks
from finetune_kit.data.token_ids import Asking, special_tokens, together
from finetune_kit.errors import DataError
from finetune_kit.settings.schema import DataConfig

Result = TypeVar("Result")
TOGETHER = 256  # rows whose texts become tokens in one call


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

    def asking(record: Record) -> Asking[list[Sample]]:
        assert isinstance(record, PromptCompletion | Text)
        return _kept(record, split, config, tokenizer, ledger, tokens.ends, needs)

    for record, kept in _each(records, asking, tokenizer):
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
    """Columns prompt_ids and row of prompts. Dropped and booked: special tokens in a text that may not have them."""
    import numpy as np

    tokens = Tokens({"prompt_ids": [], "row": []})
    counts = ledger.splits[split]

    def asking(record: Record) -> Asking[list[int] | None]:
        assert not isinstance(record, Text)
        turns = prompt_of(record)
        if reason := _special(record, [turns, record.tools], config, tokenizer, ledger)[0]:
            yield []
            ledger.drop(split, record.where, reason)
            return None
        settings = (config.chat_template_kwargs, config.special_tokens_in_text)
        try:
            return (yield from asking_prompt(tokenizer, turns, record.tools, *settings))
        except DataError as error:
            raise DataError(f"{record.where}: {error.message.removeprefix('prompt: ')}", error.fix) from None

    for record, ids in _each(records, asking, tokenizer):
        if ids is None:
            continue
        tokens.columns["prompt_ids"].append(np.asarray(ids, dtype=np.int32))
        tokens.columns["row"].append(len(tokens.records))
        tokens.records.append(record)
        counts.trained += 1
        counts.samples += 1
    counts.tokens = sum(len(ids) for ids in tokens.columns["prompt_ids"])
    return tokens


def pairs(records: list[Record], split: str, config: DataConfig, tokenizer: Any, ledger: Ledger) -> Tokens:
    """Columns prompt_ids, chosen_ids and rejected_ids (each to its end token), margin and row of pairs.

    Dropped and booked: pairs that are none (a tie, equal or empty answers, turns of the user in an answer), the same
    two answers preferred both ways round, and pairs of which a side does not fit into max_length with its prompt: cut
    off, its end would be judged in place of it. Raises DataError where no pair fits.
    """
    import numpy as np

    tokens, needs = Tokens({"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "margin": [], "row": []}), _Needs()

    def asking(record: Record) -> Asking[_Answers]:
        assert isinstance(record, Preference)
        sides = (record.chosen, record.rejected)
        reason = record.defect or _pair_defect(record)
        texts, clean = [record.prompt, *sides, record.tools], False
        if not reason:
            reason, clean = _special(record, texts, config, tokenizer, ledger)
        whole = yield from _answers(record, [] if reason else sides, config, tokenizer, ledger, clean)
        return whole if _fits(record, whole, reason, split, config, ledger, needs) else []

    for record, whole in _each(records, asking, tokenizer):
        if not whole:
            continue
        assert isinstance(record, Preference)
        (prompt, chosen), (same, rejected) = whole
        if prompt != same:
            raise AssertionError(f"{record.where}: the two sides do not have the same prompt tokens")
        for name, ids in (("prompt_ids", prompt), ("chosen_ids", chosen), ("rejected_ids", rejected)):
            tokens.columns[name].append(np.asarray(ids, dtype=np.int32))
        tokens.columns["margin"].append(math.nan if record.margin is None else record.margin)
        tokens.columns["row"].append(len(tokens.records))
        tokens.records.append(record)
        tokens.ends.update((chosen[-1], rejected[-1]))
    _check_needs(tokens, needs, split, config)
    return tokens


def labelled(records: list[Record], split: str, config: DataConfig, tokenizer: Any, ledger: Ledger) -> Tokens:
    """Columns prompt_ids, completion_ids (to the end token), label and row of labelled answers; drops as `pairs`."""
    import numpy as np

    tokens, needs = Tokens({"prompt_ids": [], "completion_ids": [], "label": [], "row": []}), _Needs()

    def asking(record: Record) -> Asking[_Answers]:
        assert isinstance(record, LabelledCompletion)
        reason = record.defect or _answer_defect(record.completion, "completion")
        texts, clean = [record.prompt, record.completion, record.tools], False
        if not reason:
            reason, clean = _special(record, texts, config, tokenizer, ledger)
        whole = yield from _answers(record, [] if reason else [record.completion], config, tokenizer, ledger, clean)
        return whole if _fits(record, whole, reason, split, config, ledger, needs) else []

    for record, whole in _each(records, asking, tokenizer):
        if not whole:
            continue
        assert isinstance(record, LabelledCompletion)
        prompt, completion = whole[0]
        tokens.columns["prompt_ids"].append(np.asarray(prompt, dtype=np.int32))
        tokens.columns["completion_ids"].append(np.asarray(completion, dtype=np.int32))
        tokens.columns["label"].append(record.label)
        tokens.columns["row"].append(len(tokens.records))
        tokens.records.append(record)
        tokens.ends.add(completion[-1])
    _check_needs(tokens, needs, split, config)
    return tokens


def sequences(row: dict[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """What a row of any kind's columns puts through a model: name -> (input_ids, labels).

    A pair has "chosen" and "rejected", a labelled answer "completion"; a conversation, a text and a prompt "".
    """
    if "labels" in row:
        return {"": (row["input_ids"], row["labels"])}
    prompt = list(row["prompt_ids"])
    masked = [IGNORED] * len(prompt)
    answers = {name: list(row[f"{name}_ids"]) for name in ("chosen", "rejected", "completion") if f"{name}_ids" in row}
    return {name: (prompt + ids, masked + ids) for name, ids in answers.items()} or {"": (prompt, masked)}


def _each(
    records: Sequence[Record], asking: Callable[[Record], Asking[Result]], tokenizer: Any
) -> Iterator[tuple[Record, Result]]:
    """Each record with what comes of it, in order; the texts of many become tokens in one call."""
    rows = iter(records)
    while batch := list(islice(rows, TOGETHER)):
        yield from zip(batch, together(map(asking, batch), tokenizer), strict=True)


_Answers = list[tuple[list[int], list[int]]]


def _answers(
    record: Preference | LabelledCompletion,
    sides: Sequence[list[Message]],
    config: DataConfig,
    tokenizer: Any,
    ledger: Ledger,
    clean: bool,
) -> Asking[_Answers]:
    """(prompt, completion) token ids of each side's answer; the completion ends with its end token.

    The prompt's own answers are not trained, whatever their marks say: the sample is the one of this answer.
    """
    prompt = [{**turn, "train": False} for turn in record.prompt]
    noted: list[str] = []
    asking = []
    for turns in sides:
        conversation = PromptCompletion(record.where, [*prompt, {**turns[0], "train": True}], record.tools)
        asking.append(asking_samples(conversation, tokenizer, replace(config, train_on="last"), noted.append, clean))
    texts = [next(side) for side in asking]
    made = iter((yield [text for some in texts for text in some]))
    for text in noted:
        ledger.note(text)
    answers = []
    for side, some in zip(asking, texts, strict=True):
        try:
            side.send([next(made) for _ in some])
        except StopIteration as done:
            sample = done.value[0]
            start, stop = sample.turns[-1]
            answers.append((sample.input_ids[:start], sample.input_ids[start:stop]))
    return answers


def _special(record: Record, texts: Any, config: DataConfig, tokenizer: Any, ledger: Ledger) -> tuple[str, bool]:
    """Book the special tokens in a row's texts; (why it cannot be trained with them or "", whether it has none)."""
    found, reason = special_tokens(tokenizer, texts, config.special_tokens_in_text)
    if found:
        ledger.special_tokens_in_text.update(found)
        ledger.special_rows += 1
    if not isinstance(record, Text) and (marks := plain_marks(tokenizer)):
        said = [str(turn["content"]) for turns in texts if turns for turn in turns if "content" in turn]
        ledger.mimicking_rows += any(mark in text for mark in marks for text in said)
    return reason, not found


def _pair_defect(record: Preference) -> str:
    reason = _answer_defect(record.chosen, "chosen") or _answer_defect(record.rejected, "rejected")
    if reason:
        return reason
    chosen, rejected = (
        (side[0]["content"].split(), side[0].get("tool_calls")) for side in (record.chosen, record.rejected)
    )
    return "chosen and rejected are equal" if chosen == rejected else ""


def _answer_defect(turns: list[Message], name: str) -> str:
    """Why some turns are not an answer; "" if they are one."""
    if [turn["role"] for turn in turns] != ["assistant"]:
        return "the sides part before the last answer"
    empty = not turns[0]["content"].strip() and not turns[0].get("tool_calls")
    return f"empty {name}" if empty else ""


def _pair_key(record: Preference) -> tuple[str, str, str]:
    """The pair's prompt and its two answers, whichever is preferred."""
    key = content_key(record.prompt), content_key(record.chosen), content_key(record.rejected)
    return key[0], min(key[1:]), max(key[1:])


def mark_contradictions(records: list[Record]) -> None:
    """Give the pairs that are preferred one way in one row and the other way in another that defect; `records` are
    those of all splits."""
    pairs = [record for record in records if isinstance(record, Preference) and not record.defect]
    chosen: dict[tuple[str, str, str], set[str]] = {}
    for pair in pairs:
        chosen.setdefault(_pair_key(pair), set()).add(content_key(pair.chosen))
    for pair in pairs:
        if len(chosen[_pair_key(pair)]) > 1:
            pair.defect = "contradictory: the same two answers preferred both ways round"


def _fits(
    record: Record,
    answers: list[tuple[list[int], list[int]]],
    reason: str,
    split: str,
    config: DataConfig,
    ledger: Ledger,
    needs: _Needs,
) -> bool:
    """Whether a row's answers (prompt, completion) are kept; booked either way."""
    counts = ledger.splits[split]
    longest = max((len(prompt) + len(completion) for prompt, completion in answers), default=0)
    if longest:
        needs.smallest = min(needs.smallest or longest, longest)
        needs.whole = max(needs.whole, longest)
    detail = ""
    if not reason and longest > config.max_length:
        reason, detail = f"longer than max_length={config.max_length}", f" ({longest} tokens)"
    if reason:
        ledger.drop(split, record.where, reason, detail)
        return False
    counts.trained += 1
    counts.samples += len(answers)
    counts.tokens += sum(len(prompt) + len(completion) for prompt, completion in answers)
    counts.supervised_tokens += sum(len(completion) for _, completion in answers)
    return True


def _check_needs(tokens: Tokens, needs: _Needs, split: str, config: DataConfig) -> None:
    if needs.smallest and not tokens.records:
        raise DataError(
            f"No {split.replace('_', '-')} row fits into data.max_length={config.max_length}.",
            f"data.max_length={needs.smallest} is the smallest that keeps one row; {needs.whole} keeps all of them.",
        )


def _kept(
    record: PromptCompletion | Text,
    split: str,
    config: DataConfig,
    tokenizer: Any,
    ledger: Ledger,
    ends: set[int],
    needs: _Needs,
) -> Asking[list[Sample]]:
    """The record's samples within max_length, booked."""
    counts, noted = ledger.splits[split], list[str]()
    reason = untrainable(record.messages, config.train_on) if isinstance(record, PromptCompletion) else ""
    texts = [record.messages, record.tools] if isinstance(record, PromptCompletion) else record.text
    clean = False
    if not reason:
        reason, clean = _special(record, texts, config, tokenizer, ledger)
    if reason:
        yield []
        whole = []
    else:
        whole = yield from asking_samples(record, tokenizer, config, noted.append, clean)
    for text in noted:
        ledger.note(text)
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
