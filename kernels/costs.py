"""What a linear costs by a model: how long the tensor cores, the memory and its latency hold up a step along k, and how
many tiles follow each other on a processor. Estimates from data sheets: they rank configurations, and a measurement
(`nunchaku-py tune`) decides.
"""
from __future__ import annotations

import math
from typing import NamedTuple

from .config import Config, Gpu, Problem, blocks, rows_alike


class Rates(NamedTuple):
    """Of a processor at each tick of its clock: INT8 multiplications, and its share of the memory's bytes."""

    int8: int
    memory: float


RATES = {(8, 0): Rates(2048, 11), (8, 6): Rates(512, 6), (8, 7): Rates(512, 6), (8, 9): Rates(1024, 3.1),
         (9, 0): Rates(4096, 19), (10, 0): Rates(8192, 28), (10, 3): Rates(8192, 28), (12, 0): Rates(1024, 4.4)}
LIKE_ANY = Rates(1024, 4.4)
SLOWER = {"int8": 1, "int4": 1, "uint4": 1, "nvfp4": 0.5, "none": 4}  # by the type of activations, than INT8
BYTES = {"int8": 1, "int4": 0.5, "uint4": 0.5, "nvfp4": 0.5625, "none": 2}
START, TURN, LATENCY = 1500, 40, 700  # ticks: a tile's beginning and end; a step's own; from a load to its bytes
UNHIDDEN = 0.1  # of what a step waits for, what the other things that it waits for do not hide
CACHED = 4  # so many times faster come bytes that another block has read before
FULL = 64 * 128  # outputs from which on a tile keeps the tensor cores of a processor busy
REGISTERS, THREADS = 65536, 32
SUMS_HELD = 128  # of a thread in registers; what else a loop and an ending hold, as parts of the sums
BESIDE = {"int4": 1.1, "uint4": 1.1}  # a group's sums
ALSO_HELD = {"store": 0.0, "gate": 0.1, "rope": 0.5, "activate": 0.1, "glu": 0.1, "quantize": 1.1}


def linear_cost(problem: Problem, config: Config, gpu: Gpu) -> float:
    """Ticks of problem (m, n, k, activations, weights, ending, the fewest channels that a tile may have)."""
    m, n, k, act, weight, ending, fewest = problem
    shared = config.stages * config.k * (config.m * BYTES[act] + config.n * BYTES[weight])
    sums = config.m * config.n / (THREADS * config.warps)
    held = sums * (1 + BESIDE.get(act, 0.0) + ALSO_HELD[ending])
    if shared > gpu.shared or config.n < fewest or held > SUMS_HELD:
        return math.inf
    resident = max(1, int(min(gpu.shared / shared, REGISTERS / (THREADS * config.warps * (held + 96)))))
    tall, wide = blocks(max(m, 1), config.m), blocks(max(n, 1), config.n)
    waves = blocks(tall * wide, gpu.processors * resident)
    resident = min(resident, blocks(tall * wide, gpu.processors))
    rates = RATES.get(gpu.capability, LIKE_ANY)
    multiply = config.m * config.n * config.k * SLOWER[act] / rates.int8
    multiply *= max(1.0, (FULL / (config.m * config.n)) ** 0.5)
    weights = config.n * BYTES[weight] / min(tall, CACHED)
    rows = min(m, config.m) * BYTES[act] / min(wide, CACHED)
    read = config.k * (weights + rows) / rates.memory
    waits = resident * multiply, resident * read, LATENCY / config.stages
    step = max(waits) + UNHIDDEN * sum(waits) + TURN
    return waves * (START + blocks(k, config.k) * step)


def linear_alike(problem: Problem) -> Problem:
    """A gate is read and multiplied while the result is stored: it changes no choice."""
    m, *sizes, ending, fewest = problem
    return rows_alike(m), *sizes, "store" if ending == "gate" else ending, fewest
