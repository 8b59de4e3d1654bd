"""A difference between two measurements of the same rows, its 95 % interval, and whether it is more than chance.

Where rows differ the interval is a paired bootstrap. Where all of them say the same, a bootstrap has width 0, whatever
their number: there the interval follows from the binomial distribution (`agreeing_interval`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune_kit.data.split import FEWEST
from finetune_kit.settings.schema import EvaluateConfig

if TYPE_CHECKING:
    import numpy as np

TAIL = 0.025  # of a 95 % interval, on either side
SHARE = (-1.0, 1.0)  # how far a value from 0 to 1 can move
ALIKE = 1e-4  # nats a token (for perplexity: share) below which two losses are the same: rounding moves them that much


def entry(
    name: str,
    before: Sequence[float],
    after: Sequence[float],
    config: EvaluateConfig,
    *,
    weights: Sequence[int] | None = None,
    higher_is_better: bool | None = False,
    alike: float = 0.0,
    perplexity: bool = False,
    within: tuple[float, float] | None = None,
    sources: int = 0,
) -> dict[str, Any]:
    """One line of the report: sum(values) / sum(weights) on both sides (a mean if no weights are given).

    `higher_is_better`: None where neither direction is better by itself. `within`: the least and the most that a row
    can differ by, such as SHARE; None where there is no such limit, and then no interval where all rows differ alike.
    `sources`: how many rows of the data these are made from, where those are fewer: a verdict needs them.
    """
    import numpy as np

    rows = [index for index in range(len(before)) if weights is None or weights[index] > 0]
    columns = [before, after, weights or [1] * len(before)]
    table = np.array([[column[index] for index in rows] for column in columns], dtype=np.float64)
    was, now, difference = (float(value) for value in _values(table.sum(axis=1), perplexity))
    every = (table[1] - table[0]) / table[2]
    same = bool((every == every[0]).all())
    if not same:
        interval = bootstrap_interval(table, config.bootstrap_samples, perplexity=perplexity)
    else:
        interval = agreeing_interval(float(every[0]), len(rows), *within) if within and len(rows) > 1 else None
    negligible = alike * (was if perplexity else 1.0)
    return {
        "name": name,
        "before": was,
        "after": now,
        "difference": difference,
        "interval": interval,
        "n": len(rows),
        "higher_is_better": higher_is_better,
        "verdict": _verdict(difference, interval, higher_is_better, negligible, min(len(rows), sources or len(rows))),
    }


def statistic_entry(
    name: str,
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """One line of the report for a number that is best at 0 and is not a mean: `statistic` of the rows' summed columns.

    `before`, `after`: of each row the same columns, (n, k); `statistic` takes their sums (k, …). Better is nearer to 0.
    The interval is a paired bootstrap; None where every resample says the same.
    """
    import numpy as np

    table = np.array([before, after], dtype=np.float64)  # (2, n, k)
    n = table.shape[1]
    was, now = (float(statistic(side.sum(axis=0))) for side in table)
    generator = np.random.default_rng(0)
    draws = [table[:, generator.integers(n, size=n)].sum(axis=1) for _ in range(config.bootstrap_samples)]
    sums = np.stack(draws, axis=-1)  # (2, k, samples)
    low, high = (float(end) for end in np.percentile(statistic(sums[1]) - statistic(sums[0]), [2.5, 97.5]))
    interval = [low, high] if low < high else None
    moved = n >= FEWEST and (interval is not None and not low <= 0 <= high)
    verdict = f"too few to judge ({n} row{'s' if n != 1 else ''})" if n < FEWEST else "no difference"
    return {
        "name": name,
        "before": was,
        "after": now,
        "difference": now - was,
        "interval": interval,
        "n": n,
        "higher_is_better": None,
        "verdict": ("better" if abs(now) < abs(was) else "worse") if moved else verdict,
    }


def spread_of(line: dict[str, Any], decimals: int = 3) -> str:
    """A report line's interval for people, or why there is none."""
    if interval := line["interval"]:
        return f"{interval[0]:+.{decimals}f} to {interval[1]:+.{decimals}f}"
    return "too few rows" if line["n"] < 2 else "none: every row moved alike"


def agreeing_interval(value: float, n: int, low: float, high: float) -> list[float]:
    """95 % interval of a mean of which `n` rows all say `value`, whatever the others from `low` to `high` may say.

    Let q be the share of all rows, seen or not, that say another value. All of n rows say this one with probability
    (1 - q)^n, which is below 2.5 % for q above u = 1 - 0.025^(1/n): u is the upper end of Clopper and Pearson's
    interval for 0 of n. With q at most u the mean, (1 - q) value + q (mean of the others), lies between
    (1 - u) value + u low and (1 - u) value + u high. For a share that is 1 in all rows that is Clopper and Pearson's
    0.025^(1/n) to 1; for a difference of two shares that is 0 in all rows, -u to u.
    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    unseen: float = 1.0 - TAIL ** (1.0 / n)
    return [(1.0 - unseen) * value + unseen * low, (1.0 - unseen) * value + unseen * high]


def share_interval(count: int, n: int) -> list[float]:
    """The exact 95 % interval of a share of which `count` of `n` were seen. Source: Clopper and Pearson (1934)."""

    def above(share: float, least: int) -> float:  # P(at least `least` of n)
        return math.fsum(math.comb(n, k) * share**k * (1.0 - share) ** (n - k) for k in range(least, n + 1))

    def solve(least: int, tail: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle, least) < tail else (low, middle)
        return (low + high) / 2

    return [solve(count, TAIL) if count else 0.0, solve(count + 1, 1.0 - TAIL) if count < n else 1.0]


def _values(sums: np.ndarray, perplexity: bool) -> tuple[Any, Any, Any]:
    """before, after and after - before from the sums (3, …) of before, after and weights."""
    import numpy as np

    was, now = sums[0] / sums[2], sums[1] / sums[2]
    if perplexity:
        was, now = np.exp(was), np.exp(now)
    return was, now, now - was


def bootstrap_interval(
    table: np.ndarray, samples: int, *, perplexity: bool = False, seed: int = 0
) -> list[float] | None:
    """95 % percentile interval of after - before, rows drawn with replacement, both sides together.

    `table` is (3, n): before, after, weight of each row. None for fewer than 2 rows. Source: Efron and Tibshirani,
    An Introduction to the Bootstrap (1993), chapter 13.
    """
    import numpy as np

    n = table.shape[1]
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    sums = np.stack([table[:, generator.integers(n, size=n)].sum(axis=1) for _ in range(samples)], axis=1)
    low, high = np.percentile(_values(sums, perplexity)[2], [2.5, 97.5])
    return [float(low), float(high)]


def _verdict(
    difference: float, interval: list[float] | None, higher_is_better: bool | None, negligible: float, n: int
) -> str:
    if n < FEWEST:
        return f"too few to judge ({n} row{'s' if n != 1 else ''})"
    if abs(difference) <= negligible or (interval and interval[0] <= 0 <= interval[1]):
        return "no difference"
    if higher_is_better is None:
        return "higher" if difference > 0 else "lower"
    return "better" if (difference > 0) == higher_is_better else "worse"
