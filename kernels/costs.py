"""What a launch costs by a model: how long the tensor cores and the memory take for a tile, and how many tiles follow
each other on a processor. Estimates from data sheets: they rank configurations, a measurement decides (tuning.py).
"""
from __future__ import annotations

import math
from typing import NamedTuple

from .config import Config, Gpu, Problem, blocks


class Rates(NamedTuple):
    """Of a processor at each tick of its clock: INT8 multiplications, and its share of the memory's bytes."""

    int8: int
    memory: float


RATES = {(8, 0): Rates(2048, 11), (8, 6): Rates(512, 6), (8, 7): Rates(512, 6), (8, 9): Rates(1024, 3.1),
         (9, 0): Rates(4096, 19), (10, 0): Rates(8192, 28), (10, 3): Rates(8192, 28), (12, 0): Rates(1024, 4.4)}
LIKE_ANY = Rates(1024, 4.4)
SLOWER = {"int8": 1, "int4": 1, "uint4": 1, "nvfp4": 0.5, "none": 4}  # by the type of activations, than INT8
BYTES = {"int8": 1, "int4": 0.5, "uint4": 0.5, "nvfp4": 0.5625, "none": 2}
START, TURN = 1500, 40  # ticks that a tile, and that a step along k takes whatever its size
FULL = 64 * 128  # outputs from which on a tile keeps the tensor cores of a processor busy
REGISTERS = 65536


def linear_cost(problem: Problem, config: Config, gpu: Gpu) -> float:
    """Ticks of problem (m, n, k, activations, weights, the fewest channels a tile may have)."""
    m, n, k, act, weight, fewest = problem
    shared = config.stages * config.k * (config.m * BYTES[act] + config.n * BYTES[weight])
    if shared > gpu.shared or config.n < fewest or config.m * config.n // (32 * config.warps) > 160:
        return math.inf
    rates = RATES.get(gpu.capability, LIKE_ANY)
    resident = max(1, min(int(gpu.shared // max(shared, 1)), REGISTERS // (config.warps * 32 * 128)))
    tiles = blocks(m, config.m) * blocks(n, config.n)
    multiply = config.m * config.n * k * SLOWER[act] / rates.int8 * max(1.0, (FULL / (config.m * config.n)) ** 0.5 / 2)
    read = k * (min(m, config.m) * BYTES[act] + config.n * BYTES[weight]) / rates.memory / 4  # caches give most
    step = blocks(k, config.k) * TURN
    waves = blocks(tiles, gpu.processors * resident)
    return waves * (START + resident * max(multiply, read) + step)
