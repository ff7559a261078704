"""Numbers from measurements: plain Python, no engine."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its standard error; NaN where a single number gives none."""

    mean: float
    error: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent ``values``.

    Raises:
        statistics.StatisticsError: there is none.
    """
    mean = statistics.fmean(values)
    return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def paired_increase(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of ``values`` over ``baseline``, measured on the same things in the same order."""
    return estimate([value - base for value, base in zip(values, baseline, strict=True)])


def block_means(values: Sequence[float], block_size: int) -> list[float]:
    """Means of consecutive blocks of ``block_size``; the last may be shorter."""
    return [statistics.fmean(values[start : start + block_size]) for start in range(0, len(values), block_size)]


def share(successes: int, trials: int) -> Estimate:
    """Of successes among ``trials``, with the binomial standard error."""
    mean = successes / trials
    return Estimate(mean, math.sqrt(mean * (1 - mean) / trials))


def repeated_ngrams(token_ids: Sequence[int], size: int = 4) -> float:
    """Share of n-grams that occurred before; 0 for a text shorter than one."""
    ngrams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
