"""Measures configurations: of each problem the best few by the model of costs, in turns A B C A B C …, by medians.

What a kernel family needs to be measured is one function, which makes a Case (tuning_cases.py).
"""
from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nunchaku_py.ops import OPS

from . import config, tuning
from .config import Choices, Config, Problem
from .gpu import gpu_of
from .tuning import Measured

BEST = 8  # by the model, of which the fastest is sought
ROUNDS = 7
FASTER = 1.02  # than the model's choice another must be, to be taken instead: less is noise
SPREAD = 256 * 2**20  # bytes of operands that no cache holds
MOST_SETS = 32
TURN = 0.002  # seconds that a turn lasts at least: beside them, starting a graph and the steps of events are nothing
_logger = logging.getLogger("nunchaku_py")
Run = Callable[[int], object]  # a call with one of the sets of operands
Turn = Callable[[], float]  # seconds of one call


class Case(NamedTuple):
    """A launch whose configuration is to be measured. operands(device): random arguments of the op, as they come in a
    model; call(args, config): the op by the kernel, in this configuration."""

    op: str
    label: str
    choices: Choices
    problem: Problem
    operands: Callable[[torch.device], tuple]
    call: Callable[[tuple, Config], object]

    @property
    def key(self) -> tuning.Key:
        return self.choices.kernel, self.choices.alike(self.problem)


class Outcome(NamedTuple):
    """measured is None where nothing could be; why: the reason, in a sentence."""

    case: Case
    measured: Measured | None
    why: str = ""


class Timer(Protocol):
    def sets(self, nbytes: int) -> int:
        """How many sets of operands of this size to take turns with."""

    def turn(self, run: Run, sets: int) -> Turn:
        """Raises what the call raises, which is compiled by now."""


class GraphTimer:
    """A CUDA graph of one call with each set, which together no cache holds: what a call costs the GPU, and not the
    host. The graphs of a problem share their memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self.first: torch.cuda.CUDAGraph | None = None

    def sets(self, nbytes: int) -> int:
        return max(1, min(MOST_SETS, math.ceil(SPREAD / max(nbytes, 1))))

    def turn(self, run: Run, sets: int) -> Turn:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.first and self.first.pool()):
            for i in range(sets):
                run(i)
        replays = math.ceil(TURN / max(_seconds(graph, 1), 1e-6))
        self.first = self.first or graph
        return lambda: _seconds(graph, replays) / sets


def _seconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Of one replay out of so many, after one that is not counted: it leaves in the caches what the others find."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / count


class OutOfTime(Exception):
    """The time for all is over."""


@dataclass
class Tuner:
    """timer: makes one for each problem; compiled: seconds that first calls have taken."""

    device: torch.device
    timer: Callable[[], Timer]
    seconds: float = math.inf
    compiled: float = 0.0

    def __post_init__(self) -> None:
        self.gpu = gpu_of(torch.empty(0, device=self.device))
        self.end = time.monotonic() + self.seconds

    @torch.no_grad()
    def run(self, cases: Iterable[Case]) -> Iterator[Outcome]:
        """Measures one after the other; each is on disk before the next begins. Ends when the time is over: what was
        begun by then is dropped, as not all that compete were measured. All are written each time: another process may
        have replaced the file by what it had read before."""
        found = []
        for case in cases:
            try:
                outcome = self.measure(case)
            except OutOfTime:
                return
            if outcome.measured:
                found.append(outcome.measured)
                tuning.record(self.gpu, found)
                config.forget()
            yield outcome

    def measure(self, case: Case) -> Outcome:
        self.check_time()
        timer = self.timer()
        try:
            first = case.operands(self.device)
            refused = OPS[case.op].explain(*first)["triton"]
            if refused != "can run":
                return Outcome(case, None, refused)
            sets = [first, *(case.operands(self.device) for _ in range(timer.sets(_nbytes(first)) - 1))]
        except torch.OutOfMemoryError:
            return Outcome(case, None, "its operands do not fit into the memory of the GPU")
        candidates = case.choices.ranked(case.problem, self.gpu)[:BEST]
        turns = self.turns(case, candidates, sets, timer)
        if not turns:
            return Outcome(case, None, "none of its configurations runs (-v says why)")
        return Outcome(case, self.chosen(case, candidates[0], turns))

    def turns(self, case: Case, candidates: list[Config], sets: list[tuple], timer: Timer) -> dict[Config, Turn]:
        """Those that compile and run."""
        found = {}
        for candidate in candidates:
            self.check_time()
            try:
                self.compile(case, candidate, sets[0])
                found[candidate] = timer.turn(lambda i, taken=candidate: case.call(sets[i], taken), len(sets))
            except Exception as failure:  # of a compiler, or of a GPU that has less than the model thinks
                said = " ".join(str(failure).split())[:200]
                _logger.info("%s: %s does not run: %s: %s", case.label, candidate, type(failure).__name__, said)
        return found

    def compile(self, case: Case, candidate: Config, args: tuple) -> None:
        began = time.monotonic()
        case.call(args, candidate)
        self.compiled += time.monotonic() - began

    def chosen(self, case: Case, default: Config, turns: dict[Config, Turn]) -> Measured:
        rounds = [{candidate: turn() for candidate, turn in turns.items()} for _ in range(ROUNDS)]
        took = {candidate: statistics.median(times[candidate] for times in rounds) for candidate in turns}
        best = min(took, key=took.__getitem__)
        if default in took and took[default] < FASTER * took[best]:
            best = default
        kernel, problem = case.key
        return Measured(kernel, problem, tuple(best), took[best], tuple(default), took.get(default), case.label)

    def check_time(self) -> None:
        if time.monotonic() >= self.end:
            raise OutOfTime


def unmeasured(cases: Iterable[Case], known: Iterable[tuning.Key]) -> list[Case]:
    """Without those that are known, and one of those that share a measurement: the first."""
    first: dict[tuning.Key, Case] = {}
    for case in cases:
        first.setdefault(case.key, case)
    return [case for key, case in first.items() if key not in set(known)]


def _nbytes(args: tuple) -> int:
    return sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, torch.Tensor))
