"""Many processes, one training: rows shared out as one process would take them, and the wrapper that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from finetune_kit import distributed
from finetune_kit.errors import SettingsError


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
    expected = distributed.sharding() or ("DistributedDataParallel" if distributed.count() > 1 else "")
    names = [type(model).__name__]
    if distributed.is_sharded(model) or "FullyShardedDataParallel" in names or "FSDP" in names[0]:
        names.append("FSDP")
    found = next((name for name in names if expected and expected in name), None)
    if expected and found is None:
        raise SettingsError(
            f"{expected} was asked for, and the model is wrapped as {names[0]}.",
            "See docs/scale.md for files that start what they say, on which devices.",
        )
