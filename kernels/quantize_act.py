"""quantize_act: codes and scales of x̂ = (x + shift)·inv_smooth, and h = x·downᵀ, from one read of x.

A block takes BM rows and goes along them, BK inputs at a time. Groups lie within a tile, so one pass does; INT8's scale
is that of the whole row, which a first pass finds, together with h: the second finds its rows in the cache. Where a
block cannot hold all ranks of h, further blocks (second axis of the grid) make the others, and only the first ones
quantize.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nunchaku_py.ops.quantize_act import empty_like_quantized
from nunchaku_py.ops.spec import ActSpec

from . import launch
from .config import Choices, Config, Gpu, Problem, blocks, choose, rows_alike
from .gpu import gpu_of
from .numbers import int8_scale, quantize_groups, quantize_int8, sizes

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# ----------------------------------------------------------------------------------------------------------- the kernel
@triton.jit
def before(ks, K, EVEN: tl.constexpr):
    """Which columns of a tile there are. EVEN: K is a multiple of tiles."""
    if EVEN:
        return tl.full(ks.shape, True, tl.int1)
    else:
        return ks < K


@triton.jit
def as_it_is(source, rows, ks, inside, K, EVEN: tl.constexpr):
    """Tile (BM, BK) of x."""
    x, = source
    return tl.load(x + rows[:, None] * K + ks[None, :], mask=inside, other=0.0)


@triton.jit
def add_hidden(h, x, down, ranks, ks, R, K, EVEN: tl.constexpr):
    """h + x·downᵀ of a tile."""
    inside = (ranks[:, None] < R) & before(ks, K, EVEN)[None, :]
    tile = tl.load(down + ranks[:, None].to(tl.int64) * K + ks[None, :], mask=inside, other=0.0)
    return tl.dot(x, tl.trans(tile), h)


@triton.jit
def smoothed(x, inv_smooth, ks, inside, shift, K, EVEN: tl.constexpr):
    """x̂ of a tile of x; +0 beyond the end of a row."""
    by = tl.load(inv_smooth + ks, mask=before(ks, K, EVEN), other=0.0)
    v = (x.to(tl.float32) + shift) * by[None, :]
    if EVEN:
        return v
    else:
        return tl.where(inside, v, 0.0)


@triton.jit
def store_groups(
    v, qx, sx, rows, i, M, codes, groups, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr
):
    """The i-th tile of the rows, quantized, to where it belongs. codes, groups: how many bytes and scales a row has."""
    BK: tl.constexpr = v.shape[1]
    packed, scales = quantize_groups(v, FORMAT, GROUP, SCALE)
    at = i * (BK // 2) + tl.arange(0, BK // 2)
    tl.store(qx + rows[:, None] * codes + at[None, :], packed, mask=(rows[:, None] < M) & (at[None, :] < codes))
    of = i * (BK // GROUP) + tl.arange(0, BK // GROUP)
    tl.store(sx + rows[:, None] * groups + of[None, :], scales, mask=(rows[:, None] < M) & (of[None, :] < groups))


@triton.jit
def quantize_rows(
    LOAD: tl.constexpr, source, inv_smooth, down, qx, sx, h, shift, rows, M, K, R, codes, groups, FORMAT: tl.constexpr,
    GROUP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ALONE: tl.constexpr, EVEN: tl.constexpr
):
    """qx, sx and h of rows of what LOAD(source, …) gives. ALONE: one block makes all ranks; BR 0: there are none."""
    BM: tl.constexpr = rows.shape[0]
    SCALE: tl.constexpr = sx.dtype.element_ty
    quantizes = True if ALONE else tl.program_id(1) == 0
    top = tl.zeros((BM,), tl.int32)
    if BR > 0:
        ranks = tl.program_id(1) * BR + tl.arange(0, BR)
        hidden = tl.zeros((BM, BR), tl.float32)
    for i in range(tl.cdiv(K, BK)):
        ks = i * BK + tl.arange(0, BK)
        inside = (rows[:, None] < M) & before(ks, K, EVEN)[None, :]
        x = LOAD(source, rows, ks, inside, K, EVEN)
        if BR > 0:
            hidden = add_hidden(hidden, x, down, ranks, ks, R, K, EVEN)
        if quantizes:
            v = smoothed(x, inv_smooth, ks, inside, shift, K, EVEN)
            if FORMAT == "int8":
                top = tl.maximum(top, tl.max(sizes(v, False), 1))
            elif FORMAT == "none":
                tl.store(qx + rows[:, None] * K + ks[None, :], v.to(qx.dtype.element_ty), mask=inside)
            else:
                store_groups(v, qx, sx, rows, i, M, codes, groups, FORMAT, GROUP, SCALE)
    if BR > 0:
        tl.store(h + rows[:, None] * R + ranks[None, :], hidden, mask=(rows[:, None] < M) & (ranks[None, :] < R))
    if FORMAT == "int8":
        if quantizes:
            scale = int8_scale(top)
            tl.store(sx + rows, scale, mask=rows < M)
            for i in range(tl.cdiv(K, BK)):
                ks = i * BK + tl.arange(0, BK)
                inside = (rows[:, None] < M) & before(ks, K, EVEN)[None, :]
                v = smoothed(LOAD(source, rows, ks, inside, K, EVEN), inv_smooth, ks, inside, shift, K, EVEN)
                tl.store(qx + rows[:, None] * K + ks[None, :], quantize_int8(v, scale), mask=inside)


@triton.jit
def quantize_act_kernel(
    x, inv_smooth, down, qx, sx, h, shift, M, K, R, codes, groups, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ALONE: tl.constexpr, EVEN: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    quantize_rows(
        as_it_is, (x,), inv_smooth, down, qx, sx, h, shift, rows, M, K, R, codes, groups, FORMAT, GROUP, BR, BK, ALONE,
        EVEN)


# ------------------------------------------------------------------------------------------------------- configurations
# n: ranks that a block makes. A thread has 16 elements of a tile at most: of twice as many, registers are spilled.
# Small m and long k for few rows, of which every processor gets some.
CONFIGS = tuple(
    Config(m, n, k, warps, stages)
    for m, k, warps in ((16, 64, 4), (16, 128, 4), (16, 256, 8), (32, 64, 4), (32, 128, 8), (64, 64, 8))
    for n in (16, 32, 64, 128)
    for stages in (4, 3, 2)
    if n * k <= 8192
)
THREADS = 65536 // 160  # that a processor runs at a time, by their registers
FROM_CACHE = 6e10  # bytes a second that a processor gets
ELEMENTS = 6e9  # a second that a processor quantizes: each takes some thirty instructions
LATENCY = 8e-7  # seconds until what is asked for has come


def cost(problem: Problem, config: Config, gpu: Gpu) -> float:
    """Seconds. problem: rows, inputs, ranks, the group that a tile holds whole, reads of x by a block that quantizes,
    the format. What is quantized in vain, beyond the last row, costs all the same."""
    m, k, r, _, reads, _ = problem
    step = config.k * 2 * (config.m + (config.n if r else 0))  # bytes of x and down
    if not _fits(problem, config) or config.stages * step > gpu.shared:
        return float("inf")
    wanted = blocks(m, config.m) * blocks(max(r, 1), config.n)
    together = max(1, min(gpu.shared // (config.stages * step), THREADS // (config.warps * 32)))
    together = min(together, max(1, blocks(wanted, gpu.processors)))
    of_step = max(together * step / FROM_CACHE, together * config.m * config.k / ELEMENTS, LATENCY / config.stages)
    return blocks(wanted, gpu.processors * together) * (LATENCY + blocks(k, config.k) * reads * of_step)


def _fits(problem: Problem, config: Config) -> bool:
    """Whole groups; rows too odd for copies of 16 bytes pass through registers, of which a thread has so many."""
    _, k, r, group, *_ = problem
    held = (config.m + config.n) * config.k // (config.warps * 32)
    return config.k % max(group, 1) == 0 and (k % 8 == 0 or held <= 24) and (r > 0 or config.n == 16)


def alike(problem: Problem) -> Problem:
    return rows_alike(problem[0]), *problem[1:]


CHOICES = Choices("quantize_act", CONFIGS, cost, alike)


def config_of(x: Tensor, down: Tensor, spec: ActSpec, more_reads: int = 0) -> Config:
    """The configuration for this problem on this GPU."""
    return choose(CHOICES, problem_of(*x.shape, down.shape[0], spec, more_reads), gpu_of(x))


def problem_of(m: int, k: int, r: int, spec: ActSpec, more_reads: int = 0) -> Problem:
    group = 0 if spec.format in ("int8", "none") else spec.group  # which have no scales of groups
    return m, k, r, group, more_reads + (2 if spec.format == "int8" else 1), spec.format


# -------------------------------------------------------------------------------------------------------- the launcher
def quantize_act(
    x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the kernel."""
    x = x.contiguous()
    return launched(quantize_act_kernel, (x,), inv_smooth, down, spec, config or config_of(x, down, spec))


def launched(
    kernel: Any, source: tuple, inv_smooth: Tensor, down: Tensor, spec: ActSpec, config: Config, **constants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(qx, sx, h) of a kernel that quantizes `source`, of which the first is x (M,K)."""
    x, ((m, k), r) = source[0], (source[0].shape, down.shape[0])
    qx, sx, h = empty_like_quantized(x, m, k, down, spec)
    stored = sx.view(torch.uint8) if spec.format == "nvfp4" else sx  # GPUs before 8.9 cannot name its type
    grid = blocks(m, config.m), blocks(max(r, 1), config.n)
    launch.launch(
        kernel, grid, *source, inv_smooth.contiguous(), down.contiguous(), qx, stored, h, spec.shift, m, k, r,
        blocks(k, 2), blocks(k, spec.group or 1), warps=config.warps, stages=config.stages, FORMAT=spec.format,
        GROUP=spec.group, BM=config.m, BR=config.n if r else 0, BK=config.k, ALONE=grid[1] == 1,
        EVEN=k % config.k == 0, **constants,
        **launch.EXACT)
    return qx, sx, h
