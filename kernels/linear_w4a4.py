"""linear_w4a4: 4-bit codes times 4-bit codes, each group with its scales.

INT4 codes become INT8, of which a tensor core sums a group in 32 bits, exactly. Which code meets which does not matter
to a sum: low nibbles meet low ones and high nibbles high ones, and nothing is put in order. NVFP4 has an instruction of
its own where this runs (compute capability 12.0).
"""
import triton
import triton.language as tl

from .config import Choices, Config
from .costs import linear_alike, linear_cost
from .decode import nibbles, sixteenfold

CHOICES = Choices("linear_w4a4", (
    Config(128, 128, 64, 8, 4), Config(64, 128, 64, 8, 4), Config(64, 128, 64, 4, 4), Config(128, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4), Config(32, 64, 64, 4, 4), Config(16, 64, 64, 4, 4),
), linear_cost, linear_alike)
NVFP4 = Choices("linear_w4a4_nvfp4", (
    Config(128, 128, 256, 8, 2), Config(128, 128, 128, 8, 3), Config(128, 128, 128, 4, 3), Config(64, 128, 128, 4, 4),
    Config(64, 128, 128, 8, 3), Config(64, 64, 256, 4, 3), Config(32, 64, 256, 4, 3), Config(16, 64, 256, 4, 3),
), linear_cost, linear_alike)


@triton.jit
def accumulate_int4(qx, sx, qw, sw, rows, channels, HALF_K, GROUPS, UNSIGNED: tl.constexpr, GROUP: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr):
    """(BN,BM) fp32: Σ_g sw·sx·(Σ_{k in g} w·x)."""
    half: tl.constexpr = GROUP // 2
    byte = tl.arange(0, half)
    x = qx + rows[None, :].to(tl.int64) * HALF_K + byte[:, None]
    w = qw + channels[:, None].to(tl.int64) * HALF_K + byte[None, :]
    x_scale, w_scale = sx + rows.to(tl.int64) * GROUPS, sw + channels.to(tl.int64) * GROUPS
    unit: tl.constexpr = 0.0625 if UNSIGNED else 0.00390625  # of codes that are 16 times too large
    acc = tl.zeros((BN, BM), tl.float32)
    for group in range(0, GROUPS):
        inside = group * half + byte < HALF_K
        w_low, w_high = sixteenfold(tl.load(w, mask=inside[None, :], other=0))
        b = tl.load(x, mask=inside[:, None], other=0)
        if UNSIGNED:
            x_low, x_high = nibbles(b, False)
        else:
            x_low, x_high = sixteenfold(b)
        total = tl.dot(w_low, x_low, out_dtype=tl.int32)
        total = tl.dot(w_high, x_high, total, out_dtype=tl.int32)
        # The product of two 16-bit scales is exact in fp32.
        of_weight = tl.load(w_scale + group).to(tl.float32) * unit
        scale = of_weight[:, None] * tl.load(x_scale + group).to(tl.float32)[None, :]
        acc = tl.fma(total.to(tl.float32), scale, acc)
        w += half
        x += half
    return acc


@triton.jit
def dot_nvfp4(a, a_scales, b, b_scales, acc):
    """acc (fp32) + a·bᵀ of tiles (rows, k/2) of two codes a byte, and (rows, k/16) of the bits of e4m3 scales."""
    return tl.dot_scaled(a, a_scales.to(tl.float8e4nv, bitcast=True), "e2m1",
                         tl.trans(b), b_scales.to(tl.float8e4nv, bitcast=True), "e2m1", acc)


@triton.jit
def accumulate_nvfp4(qx, sx, qw, sw, aux, rows, channels, K, HALF_K, GROUPS, EVEN: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BN,BM) fp32: Σ_k w·x of groups of 16 with their scales, times channel_scale."""
    byte, group = tl.arange(0, BK // 2)[None, :], tl.arange(0, BK // 16)[None, :]
    x, w = qx + rows[:, None].to(tl.int64) * HALF_K + byte, qw + channels[:, None].to(tl.int64) * HALF_K + byte
    x_scale = sx + rows[:, None].to(tl.int64) * GROUPS + group
    w_scale = sw + channels[:, None].to(tl.int64) * GROUPS + group
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            acc = dot_nvfp4(tl.load(w), tl.load(w_scale), tl.load(x), tl.load(x_scale), acc)
        else:
            bytes_in, groups_in = start // 2 + byte < HALF_K, start // 16 + group < GROUPS
            acc = dot_nvfp4(tl.load(w, mask=bytes_in, other=0), tl.load(w_scale, mask=groups_in, other=0),
                            tl.load(x, mask=bytes_in, other=0), tl.load(x_scale, mask=groups_in, other=0), acc)
        x += BK // 2
        w += BK // 2
        x_scale += BK // 16
        w_scale += BK // 16
    return acc * tl.load(aux + channels)[:, None]
