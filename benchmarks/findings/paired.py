"""Means, spreads and differences over seeds, and what they say of a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHOWS, DOES_NOT, CANNOT, MISSING = "shows", "does not show", "cannot be told", "missing"
TOO_SMALL = "shows, too small to count"
CONFIDENCE = 0.95
# The least difference that counts, by metric: below it two arms are called the same.
MARGINS: Mapping[str, float] = {"loss": 0.02, "kl": 0.02, "mtp_loss": 0.02, "mean_accepted_length": 0.05}
MARGIN_OF_SHARES = 0.02  # of acc_k, top1_agreement


def margin(metric: str) -> float:
    """The least difference of a metric that counts."""
    return MARGINS.get(metric.removeprefix("one_shot_"), MARGIN_OF_SHARES)


Pair = tuple[str, int]  # a teacher and a seed: cells that have both are compared with one another


@dataclass(frozen=True)
class Spread:
    """Of some seeds.

    Attributes:
        mean: of them.
        deviation: standard deviation of one seed; None of one.
        seeds: how many.
    """

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Difference:
    """Of two arms, seed by seed.

    Attributes:
        mean: of one arm less the other.
        error: standard error of the mean; None of one seed.
        low: of the interval that holds the mean with `CONFIDENCE`; minus infinity of one seed.
        high: likewise.
        seeds: that both arms have.
    """

    mean: float
    error: float | None
    low: float
    high: float
    seeds: int


def difference(one: Mapping[Pair, float], other: Mapping[Pair, float]) -> Difference | None:
    """One arm less the other, over the seeds that both have; None if there are none.

    Args:
        one: values by teacher and seed.
        other: likewise.
    """
    both = sorted(one.keys() & other.keys())
    if not both:
        return None
    values = [one[pair] - other[pair] for pair in both]
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Difference(mean, None, -math.inf, math.inf, 1)
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Difference(mean, error, mean - reach, mean + reach, len(values))


def verdict_of_order(found: Difference | None, least: float) -> str:
    """Whether differences say that the first arm is above the second.

    It shows if the whole interval is above zero, and is too small to count if the interval ends below the least
    difference that counts. It does not show if the whole interval is below zero, or has zero in it and ends below that
    least difference. Otherwise it cannot be told, and so with one seed.

    Args:
        found: the first arm less the second.
        least: that counts.
    """
    if found is None:
        return MISSING
    if found.low > 0:
        return SHOWS if found.high >= least else TOO_SMALL
    return DOES_NOT if found.high < 0 or (found.high < least and found.error is not None) else CANNOT


def verdict_of_sameness(found: Difference | None, least: float) -> str:
    """Whether differences say that two arms are the same.

    It shows if the whole interval is within the least difference that counts, and does not if it is outside.

    Args:
        found: one arm less the other.
        least: that counts.
    """
    if found is None:
        return MISSING
    if -least < found.low and found.high < least:
        return SHOWS
    return DOES_NOT if found.low > least or found.high < -least else CANNOT
