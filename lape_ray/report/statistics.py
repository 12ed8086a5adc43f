"""The mean of repeated measurements, and its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values; `sd` and the interval are None where n is 1.

    The interval is Student's: mean +- t(n - 1) sd / sqrt(n), which supposes that the values are distributed normally.
    """

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Tell whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of at least one value."""
        n, mean = len(values), statistics.fmean(values)
        if n < 2:
            return cls(n, mean, None, None)
        sd = statistics.stdev(values)
        half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * sd / math.sqrt(n)
        return cls(n, mean, sd, (mean - half, mean + half))
