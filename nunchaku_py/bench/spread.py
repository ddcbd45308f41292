"""Numbers of some rounds in four: median, quartiles, least."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and least of some numbers."""

    median: float
    low: float
    high: float
    least: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(*[values[0]] * 4)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, min(values))
