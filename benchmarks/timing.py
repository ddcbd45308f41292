"""Interleaved timing: A B C A B C …, so that what a shared machine does to one round it does to all of them.

Ratios are taken within a round and then summarized; medians of different rounds are never divided by each other.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nunchaku_py.bench.spread import Spread

PAUSE = 0.003  # seconds between turns: threads of one library spin for a while after a call and would disturb the next
SHORT = 0.004  # a call shorter than this is repeated within its turn, as far as this time goes
MOST_REPEATS = 64

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Seconds per call in each round, of those calls that took part; what was wrong with the others."""

    rounds: dict[str, list[float]]
    notes: dict[str, str]

    def seconds(self, name: str) -> Spread:
        return Spread.of(self.rounds[name])

    def speedup(self, name: str, baseline: str) -> Spread | None:
        """How many times as fast as the baseline, from round to round; None without common rounds."""
        mine, theirs = self.rounds.get(name, ()), self.rounds.get(baseline, ())
        pairs = [b / a for a, b in zip(mine, theirs, strict=False)]
        return Spread.of(pairs) if pairs else None


class Clock:
    """How long a whole run may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def note(self) -> str:
        return f"not reached within {self.seconds:g} s"


class Evict:
    """Reads a buffer larger than the caches, so that the next call finds its weights in memory and not in a cache."""

    def __init__(self, size: int) -> None:
        self.buffer = torch.zeros(size // 4)

    def __call__(self) -> None:
        self.buffer.amax()


def interleave(calls: Mapping[str, Call], seconds: float, limit: float, before: Call | None = None,
               least: int = 3, most: int = 25) -> Timed:
    """Time every call for about `seconds` in all, in turns; between `least` and `most` rounds.

    Every call should have been made once before. One that then takes more than `limit` seconds has this one time as its
    only round. `before` runs, untimed, ahead of every call, which is then never repeated within its turn.
    """
    warm, notes = _warm_up(calls, before)
    slow = {name: took for name, took in warm.items() if took > limit}
    notes |= {name: f"one call took {took:.1f} s, so it was not repeated" for name, took in slow.items()}
    repeats = {name: 1 if before else _repeats(took) for name, took in warm.items() if name not in slow}
    once = sum(warm[name] * count + PAUSE for name, count in repeats.items())
    rounds: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(min(most, max(least, int(seconds / max(once, 1e-9))))):
        for name, count in repeats.items():
            time.sleep(PAUSE)
            rounds[name].append(_turn(calls[name], count, before))
    return Timed({**rounds, **{name: [took] for name, took in slow.items()}}, notes)


def _warm_up(calls: Mapping[str, Call], before: Call | None) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one call of each; whatever another package raises is its answer, and is noted."""
    warm, notes = {}, {}
    for name, call in calls.items():
        try:
            warm[name] = _turn(call, 1, before)
        except Exception as refusal:
            notes[name] = sentence(refusal)
    return warm, notes


def sentence(refusal: Exception) -> str:
    """An exception as the note of a row."""
    return f"{type(refusal).__name__}: {refusal}".split("\n")[0][:300]


def _repeats(took: float) -> int:
    return min(MOST_REPEATS, max(1, math.ceil(SHORT / max(took, 1e-9))))


def _turn(call: Call, count: int, before: Call | None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
