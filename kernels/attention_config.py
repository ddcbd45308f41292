"""How attention is launched: tiles of m queries and n keys, on a model of what a processor does in a cycle."""
from __future__ import annotations

import math
from typing import NamedTuple

from .config import Choices, Config, Gpu, Problem, blocks, rows_alike

CONFIGS = tuple(
    Config(m, n, dim, warps, stages)
    for dim in (64, 128)
    for m, n, warps in ((128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (64, 32, 4))
    for stages in (3, 2)  # of two that cost the same the first is taken
)


class Rates(NamedTuple):
    """Products that a processor adds up in a cycle, with sums in int32 and fp32."""

    int8: int
    fp8: int
    half: int


RATES = {(8, 0): Rates(2048, 0, 1024), (9, 0): Rates(4096, 4096, 2048), (10, 0): Rates(8192, 8192, 4096)}
GEFORCE = Rates(1024, 512, 256)
WGMMA = (9, 10)  # generations whose products are of four warps together; others: of one, which lie along the queries
ISSUED = 4  # warps that begin an instruction in a cycle
# Instructions of a thread, counted in what is compiled for 9.0: for a score (converted, compared, scaled, raised,
# added, rounded), for an element of the sums, and for a tile.
PER_SCORE, PER_SUM, PER_TILE = 7.2, 1.0, 100.0
L2_BYTES = 24  # that a processor gets of the L2 cache in a cycle, when all ask: 5.5 TB/s of an H100
CLOCK, LAUNCH = 1.7e9, 2e-6
MOST_REGISTERS = 250  # by this estimate; 255 is what a thread can have. Products of one warp take more besides:
MOST_OF_ONE_WARP = 200


def problem_of(heads: int, tokens: int, keys: int, dim: int, fp8: bool) -> Problem:
    """heads: of all samples."""
    return heads, tokens, keys, dim, "fp8" if fp8 else "16bit"


def shared_bytes(config: Config, fp8: bool) -> int:
    """Keys and values on their way, the codes of the queries, and P on its way to where FP8 products take it from."""
    return (config.stages * config.n * config.k * (2 if fp8 else 3) + config.m * config.k
            + (config.m * config.n if fp8 else 0))


def registers(config: Config, fp8: bool) -> float:
    """Of a thread: sums, for FP8 those of a tile besides, scores, P, and what addresses take."""
    return (config.m * config.k * (1.5 if fp8 else 1.0) + 1.5 * config.m * config.n) / (32 * config.warps) + 48


def fits(config: Config, dim: int, fp8: bool, gpu: Gpu) -> bool:
    """Whether it is for such heads, has room, and keeps each query's scores within a warp (else they go through shared
    memory several times a tile)."""
    together = gpu.capability[0] in WGMMA
    room = registers(config, fp8) <= (MOST_REGISTERS if together else MOST_OF_ONE_WARP)
    whole_rows = together or config.m >= max(config.n, dim)
    return config.k == dim and whole_rows and room and shared_bytes(config, fp8) <= gpu.shared


def tile_cycles(config: Config, fp8: bool, rates: Rates) -> tuple[float, float]:
    """Of tensor cores, and of everything else, for a tile of scores."""
    scores, threads = config.m * config.n, 32 * config.warps
    multiplied = scores * config.k * (1 / rates.int8 + 1 / (rates.fp8 if fp8 else rates.half))
    issued = PER_SCORE * scores / threads + PER_SUM * config.m * config.k / threads + PER_TILE
    return multiplied, issued * config.warps / ISSUED


def cost(problem: Problem, config: Config, gpu: Gpu) -> float:
    """Seconds: rounds of blocks on all processors. Of a tile's two kinds of work half of the lesser is hidden by one
    block of eight warps, a quarter by one of four; blocks beside each other hide all. Reading keys and values comes
    beneath both, if it is fast enough."""
    heads, tokens, keys, dim, products = problem
    fp8 = products == "fp8"
    if not fits(config, dim, fp8, gpu):
        return math.inf
    beside = min(gpu.shared // shared_bytes(config, fp8), int(2048 // (registers(config, fp8) * config.warps)), 2)
    multiplied, issued = tile_cycles(config, fp8, RATES.get(gpu.capability, GEFORCE))
    hidden = 1.0 if beside > 1 else config.warps / 16
    worked = max(multiplied, issued) + (1 - hidden) * min(multiplied, issued)
    cycles = max(worked, config.n * dim * (2 if fp8 else 3) / L2_BYTES)
    rounds = blocks(heads * blocks(tokens, config.m), gpu.processors)
    return LAUNCH + rounds * blocks(keys, config.n) * cycles / CLOCK


def alike(problem: Problem) -> Problem:
    heads, tokens, keys, *rest = problem
    return heads, rows_alike(tokens), rows_alike(keys), *rest


CHOICES = Choices("attention", CONFIGS, cost, alike)
