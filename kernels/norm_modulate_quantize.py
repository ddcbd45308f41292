"""norm_modulate_quantize: quantize_act of norm(x)·norm_weight·(1 + scale) + shift, rounded once to x's type.

A pass finds each row's mean and variance; those that follow, quantize_act's own, find the rows in the cache. The pass
keeps a mean, and the squared distances from it, for every place in a tile, of what stands there in all the row's tiles,
and brings them together at the end: a large mean costs no digits, and x is read once.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nunchaku_py.ops.spec import ActSpec

from .config import Config
from .quantize_act import before, config_of, launched, quantize_rows


@triton.jit
def moments(x, rows, M, K, BK: tl.constexpr, EVEN: tl.constexpr):
    """Mean and mean squared distance from it, fp32 (BM), of rows of x."""
    BM: tl.constexpr = rows.shape[0]
    mean, squares = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)
    for i in range(tl.cdiv(K, BK)):
        ks = i * BK + tl.arange(0, BK)
        inside = (rows[:, None] < M) & before(ks, K, EVEN)[None, :]
        value = tl.load(x + rows[:, None] * K + ks[None, :], mask=inside, other=0.0).to(tl.float32)
        apart = distance(value, mean, inside, EVEN)
        mean += apart * tl.math.div_rn(1.0, (i + 1) * 1.0)
        squares += apart * distance(value, mean, inside, EVEN)
    counts = (tl.maximum(K - tl.arange(0, BK) + BK - 1, 0) // BK).to(tl.float32)  # of each column of the tiles
    inputs = K * 1.0
    whole = tl.math.div_rn(tl.sum(mean * counts[None, :], 1), inputs)
    apart = mean - whole[:, None]
    return whole, tl.math.div_rn(tl.sum(squares + apart * apart * counts[None, :], 1), inputs)


@triton.jit
def distance(value, mean, inside, EVEN: tl.constexpr):
    """value − mean; 0 beyond the end of a row."""
    if EVEN:
        return value - mean
    else:
        return tl.where(inside, value - mean, 0.0)


@triton.jit
def mean_square(x, rows, M, K, BK: tl.constexpr, EVEN: tl.constexpr):
    """fp32 (BM) of rows of x."""
    squares = tl.zeros((rows.shape[0], BK), tl.float32)
    for i in range(tl.cdiv(K, BK)):
        ks = i * BK + tl.arange(0, BK)
        inside = (rows[:, None] < M) & before(ks, K, EVEN)[None, :]
        value = tl.load(x + rows[:, None] * K + ks[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += value * value
    return tl.math.div_rn(tl.sum(squares, 1), K * 1.0)


@triton.jit
def of_samples(tensor, samples, ks, K, EVEN: tl.constexpr):
    """Tile of modulation (B,K), fp32, of the samples that rows belong to: (BM, BK), or (1, BK) of the only one."""
    at = samples[:, None] * K + ks[None, :]
    return tl.load(tensor + at, mask=(samples[:, None] >= 0) & before(ks, K, EVEN)[None, :], other=0.0).to(tl.float32)


@triton.jit
def modulated(source, rows, ks, inside, K, EVEN: tl.constexpr):
    """Tile (BM, BK) of norm(x)·norm_weight·(1 + scale) + shift, in x's type."""
    x, norm_weight, scale, shift, mean, by, samples = source
    value = tl.load(x + rows[:, None] * K + ks[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + ks, mask=before(ks, K, EVEN), other=0.0).to(tl.float32)
    grow = 1.0 + of_samples(scale, samples, ks, K, EVEN)
    value = (value - mean[:, None]) * by[:, None] * weight[None, :] * grow + of_samples(shift, samples, ks, K, EVEN)
    if EVEN:
        return value.to(x.dtype.element_ty)
    else:
        return tl.where(inside, value, 0.0).to(x.dtype.element_ty)


@triton.jit
def norm_modulate_quantize_kernel(
    x, norm_weight, scale, shift, rows_of_sample, eps, inv_smooth, down, qx, sx, h, act_shift, M, K, R, codes, groups,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    ALONE: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr, ONE_SAMPLE: tl.constexpr
):
    """ONE_SAMPLE: the rows of a block belong to one."""
    first = tl.program_id(0).to(tl.int64) * BM
    rows = first + tl.arange(0, BM)
    if NORM == "layer":
        mean, variance = moments(x, rows, M, K, BK, EVEN)
    else:
        mean, variance = tl.zeros((BM,), tl.float32), mean_square(x, rows, M, K, BK, EVEN)
    by = tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))
    samples = tl.minimum(first + tl.arange(0, 1 if ONE_SAMPLE else BM), M - 1) // rows_of_sample
    quantize_rows(
        modulated, (x, norm_weight, scale, shift, mean, by, samples), inv_smooth, down, qx, sx, h, act_shift, rows, M,
        K, R, codes, groups, FORMAT, GROUP, BR, BK, ALONE, EVEN)


def norm_modulate_quantize(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec,
    config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, by the kernel."""
    x, norm_weight, scale, shift = (tensor.contiguous() for tensor in (x, norm_weight, scale, shift))
    config = config or config_of(x, down, spec, more_reads=1)
    samples = scale.shape[0]
    rows = x.shape[0] // samples
    source = x, norm_weight, scale, shift, rows, spec.eps
    return launched(norm_modulate_quantize_kernel, source, inv_smooth, down, spec, config, NORM=spec.norm,
                    ONE_SAMPLE=samples == 1 or rows % config.m == 0)
