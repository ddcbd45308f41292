"""How attention is launched: tiles of m queries and n keys."""
from __future__ import annotations

import math

from .config import Choices, Config, Gpu, Problem, blocks

CONFIGS = tuple(
    Config(m, n, dim, warps, stages)
    for dim in (64, 128)
    for m, n, warps in ((128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (64, 32, 4))
    for stages in (2, 3)
)
REGISTERS = 65536  # of a processor
# What a processor multiplies and adds in a cycle by tensor cores, in int8; half of it in 16 bit. Others: as on RTX 40.
INT8 = {8: 1024, 9: 4096, 10: 8192, 12: 1024}
LANES, EXP2 = 128, 16  # fp32 operations of a processor in a cycle; powers of two
STEPS = 7  # fp32 operations of a score: converted, compared, scaled, summed, rounded
CLOCK = 1.7e9
LAUNCH = 2e-6


def problem_of(heads: int, tokens: int, keys: int, dim: int, fp8: bool) -> Problem:
    """heads: of all samples."""
    return heads, tokens, keys, dim, "fp8" if fp8 else "16bit"


def shared_bytes(config: Config, fp8: bool) -> int:
    """Keys and values on their way, the codes of the queries, and P on its way to where FP8 products take it from."""
    return (config.stages * config.n * config.k * (2 if fp8 else 3) + config.m * config.k
            + (config.m * config.n if fp8 else 0))


def registers(config: Config, fp8: bool) -> float:
    """Of a thread: sums, a second set of them for FP8, scores, P, and what addresses take."""
    sums = config.m * config.k * (2 if fp8 else 1)
    return (sums + 1.5 * config.m * config.n) / (32 * config.warps) + 48


def cost(problem: Problem, config: Config, gpu: Gpu) -> float:
    """Seconds: of so many rounds of blocks on all processors, each with its products and its fp32 operations, which
    overlap where more than four warps are there."""
    heads, tokens, keys, dim, products = problem
    fp8 = products == "fp8"
    if config.k != dim or shared_bytes(config, fp8) > gpu.shared or registers(config, fp8) > 240:
        return math.inf
    resident = min(gpu.shared // shared_bytes(config, fp8),
                   int(REGISTERS // (registers(config, fp8) * 32 * config.warps)), 4)
    scores = config.m * blocks(keys, config.n) * config.n
    multiplied = scores * dim * (2 if fp8 else 3) / INT8.get(gpu.capability[0], 1024)
    computed = scores * (STEPS / LANES + 1 / EXP2) + blocks(keys, config.n) * config.m * dim / LANES
    hidden = 0.7 if resident * config.warps > 4 else 0.0
    cycles = max(multiplied, computed) + (1 - hidden) * min(multiplied, computed)
    rounds = blocks(heads * blocks(tokens, config.m), gpu.processors)
    return LAUNCH + rounds * cycles / CLOCK


CHOICES = Choices("attention", CONFIGS, cost)
