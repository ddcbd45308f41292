"""Launch configurations: rows of data beside each kernel, of which one is taken for a problem and a GPU. What was
measured there (tuning.py) comes first, else what a model of costs says. Nothing here needs Triton or a GPU.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from nunchaku_py.errors import NunchakuError

from . import tuning

Problem = tuple[int | str, ...]  # what a launch is asked for: sizes, then the names of what it computes


class Gpu(NamedTuple):
    """What costs depend on."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int  # bytes of shared memory that a block may have


class Config(NamedTuple):
    """A block's tile m×n, the k it takes at a time, its warps, and how many such k are on their way at once."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def itself(problem: Problem) -> Problem:
    return problem


@dataclass(frozen=True)
class Choices:
    """A kernel's configurations. cost(problem, config, gpu): seconds by the model, infinite where it does not fit;
    alike(problem): the one that stands for all problems which share what was measured."""

    kernel: str
    configs: tuple[Config, ...]
    cost: Callable[[Problem, Config, Gpu], float]
    alike: Callable[[Problem], Problem] = itself

    def ranked(self, problem: Problem, gpu: Gpu) -> list[Config]:
        """Those that fit, the cheapest by the model first."""
        costs = {config: self.cost(problem, config, gpu) for config in self.configs}
        fitting = sorted((c for c in self.configs if math.isfinite(costs[c])), key=costs.__getitem__)
        if not fitting:
            raise NunchakuError(f"{self.kernel}: no configuration fits {problem} on {gpu.name}")
        return fitting


@cache
def choose(choices: Choices, problem: Problem, gpu: Gpu) -> Config:
    """The configuration that a launch takes: the one measured, else the cheapest by the model."""
    return tuning.choice(choices, problem, gpu) or choices.ranked(problem, gpu)[0]


def forget() -> None:
    """What was measured is read anew from here on."""
    tuning.forget()
    choose.cache_clear()


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def rows_alike(rows: int) -> int:
    """Numbers of rows up to a power of two, from the one before it on, share what was measured."""
    return 1 << max(rows - 1, 0).bit_length()
