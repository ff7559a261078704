"""Computes numbers from measurements, in plain Python."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A mean and its standard error; NaN where a single number gives none."""

    mean: float
    error: float


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of independent ``values``.

    Raises:
        statistics.StatisticsError: there are no values.
    """
    mean = statistics.fmean(values)
    return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def paired_increase(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Returns how much ``values`` exceed ``baseline``, both measured on the same things in the same order."""
    return estimate([value - base for value, base in zip(values, baseline, strict=True)])


def block_means(values: Sequence[float], block_size: int) -> list[float]:
    """Returns the means of consecutive blocks of ``block_size`` values; the last block may be shorter."""
    return [statistics.fmean(values[start : start + block_size]) for start in range(0, len(values), block_size)]


def share(successes: int, trials: int) -> Estimate:
    """Returns the share of successes among ``trials``, with the binomial standard error."""
    mean = successes / trials
    return Estimate(mean, math.sqrt(mean * (1 - mean) / trials))


def rounded(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, standard error and number of independent ``values``, as JSON; the error of a single one is None."""
    mean, error = estimate(values)
    return {
        "mean": round(mean, 5),
        "error": None if math.isnan(error) else round(error, 5),
        "trials": len(values),
    }


def repeated_ngrams(token_ids: Sequence[int], size: int = 4) -> float:
    """Returns the share of n-grams that occurred before in the same text; 0 for a text shorter than one n-gram."""
    ngrams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
