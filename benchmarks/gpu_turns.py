"""One call over several sets of operands, timed in turns: as a CUDA graph on a GPU, as it is on a CPU's dry run."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.timing import Timed

TURN = 0.003  # seconds that a turn lasts at least: beside them, starting a graph and the steps of events are nothing
Run = Callable[[int], Tensor]  # of a set of operands
Turn = Callable[[], float]  # seconds of one call


def turn_of(run: Run, sets: int, device: str) -> Turn:
    if torch.device(device).type != "cuda":
        return lambda: host_seconds(run, sets)
    graph = in_graph(run, sets)
    replays = math.ceil(TURN / replay_seconds(graph, 1))
    return lambda: replay_seconds(graph, replays) / sets


def in_graph(run: Run, sets: int) -> torch.cuda.CUDAGraph:
    """One call with each set of operands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            run(i)
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Of one replay out of so many, after one that is not counted: it leaves in the caches what the others find."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / count


def host_seconds(run: Run, sets: int) -> float:
    started = time.perf_counter()
    for i in range(sets):
        run(i)
    return (time.perf_counter() - started) / sets


def in_turns(turns: Mapping[str, Turn], rounds: int) -> Timed:
    """A B C A B C …: what heats or throttles the GPU in one round does so to all of them."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            found[name].append(turn())
    return Timed(found, {})
