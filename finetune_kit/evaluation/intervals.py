"""A difference between two measurements of the same rows, its 95 % interval, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_kit.config import EvaluateConfig

if TYPE_CHECKING:
    import numpy as np

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
) -> dict[str, Any]:
    """One line of the report: sum(values) / sum(weights) on both sides (a mean if no weights are given).

    `higher_is_better`: None where neither direction is better by itself.
    """
    import numpy as np

    rows = [index for index in range(len(before)) if weights is None or weights[index] > 0]
    columns = [before, after, weights or [1] * len(before)]
    table = np.array([[column[index] for index in rows] for column in columns], dtype=np.float64)
    was, now, difference = (float(value) for value in _values(table.sum(axis=1), perplexity))
    interval = bootstrap_interval(table, config.bootstrap_samples, perplexity=perplexity)
    negligible = alike * (was if perplexity else 1.0)
    return {
        "name": name,
        "before": was,
        "after": now,
        "difference": difference,
        "interval": interval,
        "n": len(rows),
        "higher_is_better": higher_is_better,
        "verdict": _verdict(difference, interval, higher_is_better, negligible),
    }


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


def _verdict(difference: float, interval: list[float] | None, higher_is_better: bool | None, negligible: float) -> str:
    if interval is None:
        return "too few rows to tell"
    if interval[0] <= 0 <= interval[1] or abs(difference) <= negligible:
        return "no difference"
    if higher_is_better is None:
        return "higher" if difference > 0 else "lower"
    return "better" if (difference > 0) == higher_is_better else "worse"
