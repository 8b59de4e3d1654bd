"""Many processes, one training: rows shared out as one process would take them, and the wrapper that was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from finetune_kit import processes
from finetune_kit.errors import SettingsError


def share_rows(trainer: Any, by_token: bool) -> None:
    """Let every step of the trainer see the rows that one process with as large a batch would see, each once.

    accelerate fills the last batches of an epoch up with rows from its beginning, which then count twice. `by_token`:
    the loss is a mean over the labels of all processes, so that these may have unlike numbers of rows.
    """
    whole = trainer.get_train_dataloader

    def share() -> Any:
        loader = whole()
        shard = loader.batch_sampler  # accelerate's: batch i of every `count` is that of process i
        shard.batch_sampler = Rounds(shard.batch_sampler, processes.count(), by_token)
        shard.even_batches = False
        return loader

    trainer.get_train_dataloader = share


class Rounds:
    """A batch sampler in rounds of one batch for each process; only the last round of an epoch may be smaller."""

    def __init__(self, batches: Any, count: int, by_token: bool) -> None:
        self.batches, self.count, self.by_token = batches, count, by_token
        self.sampler, self.batch_size, self.drop_last = batches.sampler, batches.batch_size, batches.drop_last

    def __len__(self) -> int:
        """Batches, those of all processes."""
        return math.ceil(len(self.batches) / self.count) * self.count

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[list[int]] = []
        for batch in self.batches:
            waiting.append(batch)
            if len(waiting) == self.count and len(batch) == self.batch_size:
                yield from waiting
                waiting = []
        if left := [row for batch in waiting for row in batch]:
            yield from last_round(left, self.count, self.batch_size, self.by_token)


def last_round(rows: Sequence[int], count: int, most: int, by_token: bool) -> list[list[int]]:
    """The rows that are left at the end of an epoch, at most count * most, as one batch for each of `count` processes.

    Each row counts alike: all processes get the same number of different rows, or, where that does not come out even,
    each row is given to as many processes as it takes. Where this would need more than `most` rows in a batch, the
    fewest rows are left out, fewer than `count`; `by_token`, some processes get a row more instead.
    """
    rows = list(rows)
    if by_token and len(rows) >= count:
        return [rows[place::count] for place in range(count)]
    # n rows, each given to `times` processes, make batches of n / gcd(n, count)
    kept = next(n for n in range(len(rows), 0, -1) if n // math.gcd(n, count) <= most)
    times, each = count // math.gcd(kept, count), kept // math.gcd(kept, count)
    slots = rows[:kept] * times
    return [slots[place * each : (place + 1) * each] for place in range(count)]


def check_wrapper(model: Any) -> None:
    """Raises SettingsError where the trainer has not wrapped its model as the launcher was told to."""
    expected = processes.sharding() or ("DistributedDataParallel" if processes.count() > 1 else "")
    names = [type(model).__name__]
    if processes.is_sharded(model) or "FullyShardedDataParallel" in names or "FSDP" in names[0]:
        names.append("FSDP")
    found = next((name for name in names if expected and expected in name), None)
    if expected and found is None:
        raise SettingsError(
            f"{expected} was asked for, and the model is wrapped as {names[0]}.",
            "See docs/scale.md for files that start what they say, on which devices.",
        )
