"""Which rows are held out, which are mixed in, and which training rows the held-out ones already contain."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

from finetune_kit.data.ledger import REPEATED, Ledger, digest, keys_of, prompt_key, same_key
from finetune_kit.data.records import LabelledCompletion, Preference, Record, Text
from finetune_kit.errors import DataError, SettingsError

SHARE, LARGEST_SHARE = 0.05, 0.2
FEWEST = (
    20  # rows that a verdict needs: with 4 pairs a coin is "better" 6 times in 100, and a share is +-20 points wide
)
MOST = 256  # rows
DRAWS = 100  # of a held-out side that has both labels
RULE = f"{SHARE * 100:g} %, at least {FEWEST} rows (but no more than {LARGEST_SHARE * 100:g} %), at most {MOST} rows"


def held_out_count(size: float | None, rows: int) -> int:
    """How many of `rows` are held out: `size` rows, or a share below 1; unset as RULE says, and at least 1."""
    if size is None:
        least = min(FEWEST, math.floor(rows * LARGEST_SHARE))
        return max(1, min(MOST, max(least, round(rows * SHARE))))
    if size < 0:
        raise SettingsError(f"data.held_out_size={size}: expected rows, or a share below 1.")
    return round(size) if size >= 1 or size == 0 else max(1, round(rows * size))


def split_off(records: list[Record], size: float | None, seed: int) -> tuple[list[Record], list[Record]]:
    """(training, held-out) rows in their old order, drawn by `seed`; rows with the same prompt stay on one side.

    Where all rows share one prompt, equal rows stay on one side instead. Labelled answers are drawn again until both
    sides have liked and disliked ones, if any of DRAWS draws has. Raises DataError where a side would be empty.
    """
    wanted = held_out_count(size, len(records))
    judged = [record.where for record in records if isinstance(record, Preference | LabelledCompletion)]
    if size is None and judged:
        rows = source_rows(judged)
        wanted = held_out_count(None, rows) * len(judged) // rows
    if wanted == 0:
        return records, []
    for key in (prompt_key, same_key):
        groups = _groups(records, key)
        first, best = None, -1
        for number in range(DRAWS):
            held = _draw(groups, wanted, seed + DRAWS * number)
            if not held or len(held) == len(records):
                break
            train = [record for i, record in enumerate(records) if i not in held]
            apart = [record for i, record in enumerate(records) if i in held]
            # training on one label alone is worse than measuring one, on disliked ones alone it cannot be, and disliked
            # ones alone say the least
            found = 8 * (labels(train) != {False}) + 4 * (labels(train) == labels(records))
            found += 2 * (labels(apart) == labels(records)) + (labels(apart) != {False})
            if found > best:
                first, best = (train, apart), found
            if found == (15 if _can_part(records, groups) else 13):
                break
        if first:
            return first
    if len(_groups(records, same_key)) < 2:
        alike = "is one row" if len(records) == 1 else f"are {len(records)} rows, all of them equal"
        raise DataError(
            f"There {alike}, so none can be held out for evaluation: one that is trained on measures memory.",
            "Give other rows to evaluate on: data.held_out_path=FILE",
        )
    raise DataError(
        f"{len(records)} rows are too few, or too alike, to hold {wanted} out for evaluation.",
        "Give the rows to evaluate on: data.held_out_path=FILE, or hold out fewer: data.held_out_size=1",
    )


def source_rows(places: Iterable[str]) -> int:
    """How many rows of the data are behind answers at these places: all pairs of a row, and the two labelled answers of
    a pair, come from one, and say no more than one about chance."""
    return len({re.sub(r"(:\d+)\.\d+$", r"\1", place) for place in places})


def labels(records: list[Record]) -> set[bool]:
    """Which labels some rows have; none where they are not labelled answers."""
    return {record.label for record in records if isinstance(record, LabelledCompletion)}


def _groups(records: list[Record], key: Callable[[Record], str]) -> list[list[int]]:
    """Indices of the rows of each key."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[digest(key(record))].append(index)
    return list(groups.values())


def _can_part(records: list[Record], groups: list[list[int]]) -> bool:
    """Whether every label is in more than one group, so that both sides may have it."""
    times = Counter(label for group in groups for label in labels([records[index] for index in group]))
    return all(count > 1 for count in times.values())


def _draw(groups: list[list[int]], wanted: int, seed: int) -> set[int]:
    """Indices of about `wanted` rows: whole groups in random order, too large ones passed over."""
    order = list(groups)
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= wanted:
            held.update(group)
    if not held and len(order) > 1:  # every group is larger than what is wanted: the smallest one, then
        held.update(sorted(order, key=len)[0])
    return held


def mix(pools: list[list[Record]], weights: list[float], seed: int, ledger: Ledger, names: list[str]) -> list[Record]:
    """Rows of all sources in the shares `weights` give, drawn without replacement as far as the scarcest one lasts.

    Without weights all rows are taken. What was left out is said in the ledger.
    """
    if not weights:
        return [record for pool in pools for record in pool]
    if len(weights) != len(pools) or min(weights) < 0 or sum(weights) <= 0:
        raise SettingsError(
            f"data.weights={weights}: expected one number for each of {len(pools)} paths, none negative, not all 0.",
            f"Such as data.weights=[{', '.join(['1'] * len(pools))}]",
        )
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(pool) / share for pool, share in zip(pools, shares, strict=True) if share)
    mixed: list[Record] = []
    for pool, share, name in zip(pools, shares, names, strict=True):
        count = min(len(pool), round(total * share))
        mixed += sample(pool, count, seed)
        ledger.note(f"Mixed by data.weights: {count} of the {len(pool)} training rows of {name} ({share:.0%}).")
    return mixed


def sample(records: list[Record], count: int, seed: int) -> list[Record]:
    """`count` rows drawn by `seed` without replacement, in their old order; all of them if there are no more."""
    if count >= len(records):
        return records
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), count))]


def drop_repeated(held_out: list[Record], ledger: Ledger) -> list[Record]:
    """Held-out rows that say something new; the others are counted as dropped: measured twice, a row would count as two
    in every interval, and 20 copies of one as enough for a verdict."""
    kept: dict[str, Record] = {}
    for record in held_out:
        _, same, answer = keys_of(record)
        key = f"{same}\x1d{answer}"
        if kept.setdefault(key, record) is not record:
            ledger.drop("held_out", record.where, REPEATED)
    return list(kept.values())


def drop_overlap(train: list[Record], held_out: list[Record], ledger: Ledger) -> list[Record]:
    """Training rows that are not held out too; the others are counted as dropped. Duplicates are counted and kept.

    Held-out prompts and answers that training rows have, too, are counted in a note: what is measured there may be
    memory.
    """
    keys = [tuple(map(digest, keys_of(record))) for record in held_out]
    held = {same for _, same, _ in keys}
    prompts, answers = {prompt for prompt, _, _ in keys}, {answer for *_, answer in keys} - {NOTHING}
    kept, seen = list[Record](), set[bytes]()
    shared_prompts, shared_answers = set[bytes](), set[bytes]()
    for record in train:
        prompt, same, answer = map(digest, keys_of(record))
        if same in held:
            ledger.drop("train", record.where, "also held out")
            continue
        ledger.train.duplicates += same in seen
        seen.add(same)
        kept.append(record)
        shared_prompts.update({prompt} & prompts)
        shared_answers.update({answer} & answers)
    for what, place, there in (("prompts", 0, shared_prompts), ("answers", 2, shared_answers)):
        said = [key[place] for key in keys if key[place] != NOTHING]
        if shared := sum(key in there for key in said):
            ledger.note(
                f"{shared} of {len(said)} held-out {what} are in training rows, too: there memory counts as skill"
            )
    return kept


NOTHING = digest("")
STRETCH = 13  # words, by which GPT-3's authors looked for test text in training text (arXiv 2005.14165, appendix C)
MOST_SHARED = 0.5  # of a text's stretches, or of the held-out texts


def texts_within(held_out: list[Record], train: list[Record]) -> list[Record]:
    """The held-out texts of which more than half of all stretches of 13 words stand in a training text, too."""
    held = [(record, set(_stretches(record.text))) for record in held_out if isinstance(record, Text)]
    sought = {stretch for _, stretches in held for stretch in stretches}
    if not sought:
        return []
    found: set[int] = set()
    for record in train:
        if isinstance(record, Text):
            found.update(sought.intersection(_stretches(record.text)))
    return [record for record, own in held if own and len(own & found) > MOST_SHARED * len(own)]


def _stretches(text: str) -> Iterator[int]:
    words = text.split()
    return (hash(tuple(words[at : at + STRETCH])) for at in range(len(words) - STRETCH + 1))
