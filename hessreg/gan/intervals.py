"""Confidence intervals over seeds, of values and of curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Curve", "Interval", "confidence_interval", "mean_curve"]

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    """A mean, and what it is known to.

    Attributes:
        mean: Of the values.
        margin: Half of the interval's width; NaN for a single value.
    """

    mean: float
    margin: float

    def text(self, form: str) -> str:
        """Return it for a table."""
        return f"{self.mean:{form}} ± {self.margin:{form}}"


def confidence_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return Student's interval for the mean of independent normal values.

    Args:
        values: One for each seed.
        level: Share of such intervals that hold the mean.

    Example:
        >>> confidence_interval([1.0, 2.0, 3.0]).text(".3f")
        '2.000 ± 2.484'
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, float("nan"))
    from scipy.special import stdtrit

    quantile = float(stdtrit(count - 1, 0.5 + 0.5 * level))
    return Interval(mean, quantile * statistics.stdev(values) / count**0.5)


@dataclass(frozen=True)
class Curve:
    """Intervals of a quantity in the course of training.

    Attributes:
        x: Where, ascending.
        intervals: At each.
    """

    x: Sequence[float]
    intervals: Sequence[Interval]

    def at(self, x: float) -> Interval:
        """Return the interval at one of ``x``."""
        return self.intervals[list(self.x).index(x)]


def mean_curve(runs: Sequence[Rows], key: str, against: str, extra: Sequence[float] = ()) -> Curve:
    """Return the mean over runs, which have values at moments of their own, linear between them.

    Args:
        runs: Of each seed the rows of its ``metrics.jsonl``.
        key: The quantity; rows without it do not count.
        against: The moment: ``"step"`` or ``"cpu_seconds"``.
        extra: Other moments to have.

    Returns:
        From where all runs have begun to where the first has ended, at the first's moments.
    """
    lines = [_line(rows, key, against) for rows in runs]
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    moments = [x for x in sorted({*lines[0][0], low, high, *extra}) if low <= x <= high]
    values = [np.interp(moments, x, y) for x, y in lines]
    return Curve(moments, [confidence_interval(list(each)) for each in zip(*values, strict=True)])


def _line(rows: Rows, key: str, against: str) -> tuple[list[float], list[float]]:
    found = [row for row in rows if key in row]
    return [row[against] for row in found], [row[key] for row in found]
