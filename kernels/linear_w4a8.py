"""linear_w4a8: INT8 times INT8, summed in 32 bits over all of K; 4-bit weights become INT8 on the way.

For many rows they become so once, in a pass of their own over the weight (`expand`): in the product each block of rows
would do it again. For few rows that pass costs more than the product.
"""
import triton
import triton.language as tl

from .config import Choices, Config
from .costs import linear_alike, linear_cost
from .decode import group_numbers, weights
from .numbers import whole_codes

FEW_ROWS = 64  # up to which one block of rows expands the weight for itself
CHOICES = Choices("linear_w4a8", (
    Config(256, 128, 128, 8, 3), Config(128, 256, 64, 8, 3), Config(128, 128, 128, 8, 4), Config(128, 128, 128, 8, 3),
    Config(128, 128, 64, 4, 4), Config(64, 128, 128, 8, 3), Config(64, 128, 128, 4, 4), Config(64, 64, 128, 4, 4),
    Config(32, 64, 256, 4, 3), Config(16, 128, 128, 4, 4), Config(16, 64, 256, 4, 3), Config(16, 32, 256, 4, 3),
), linear_cost, linear_alike)
EXPANDING = Choices("linear_w4a8_expanding", (
    Config(64, 64, 128, 4, 3), Config(32, 128, 128, 8, 3), Config(32, 64, 128, 4, 3), Config(16, 128, 128, 4, 4),
    Config(16, 64, 128, 4, 4), Config(16, 32, 256, 4, 3),
), linear_cost, linear_alike)


@triton.jit
def accumulate(qx, sx, qw, sw, rows, channels, K, EVEN: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BN,BM) fp32: Σ_k w8·x·sx·s_ch."""
    k = tl.arange(0, BK)
    x = qx + rows[None, :].to(tl.int64) * K + k[:, None]
    w = qw + channels[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros((BN, BM), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            acc = tl.dot(tl.load(w), tl.load(x), acc, out_dtype=tl.int32)
        else:
            inside = start + k < K
            acc = tl.dot(tl.load(w, mask=inside[None, :], other=0), tl.load(x, mask=inside[:, None], other=0), acc,
                         out_dtype=tl.int32)
        w += BK
        x += BK
    return acc.to(tl.float32) * tl.load(sx + rows)[None, :] * tl.load(sw + channels)[:, None]


@triton.jit
def accumulate_expanding(qx, sx, qw, sw, aux, rows, channels, N, K, HALF_K, GROUPS, EVEN: tl.constexpr,
                         WEIGHT: tl.constexpr, GROUP: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same of a 4-bit weight, with s_ch in aux. Weights come first: there the tensor cores of Hopper take them from
    registers."""
    k = tl.arange(0, BK)
    x = qx + rows[None, :].to(tl.int64) * K + k[:, None]
    s_ch = tl.load(aux + channels)
    acc = tl.zeros((BN, BM), tl.int32)
    for start in range(0, K, BK):
        w8 = expanded(qw, sw, aux, channels, s_ch, start, N, K, HALF_K, GROUPS, EVEN, WEIGHT, GROUP, BK)
        if EVEN:
            acc = tl.dot(w8, tl.load(x), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w8, tl.load(x, mask=(start + k < K)[:, None], other=0), acc, out_dtype=tl.int32)
        x += BK
    return acc.to(tl.float32) * tl.load(sx + rows)[None, :] * s_ch[:, None]


@triton.jit
def expanded(qw, sw, aux, channels, s_ch, start, N, K, HALF_K, GROUPS, EVEN: tl.constexpr,
             WEIGHT: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr):
    """INT8 (rows, BK): formats.fold_int8's round(w/s_ch) of the inputs from `start` on."""
    wide = channels[:, None].to(tl.int64)
    byte = start // 2 + tl.arange(0, BK // 2)[None, :]
    if EVEN:
        b = tl.load(qw + wide * HALF_K + byte)
    else:
        b = tl.load(qw + wide * HALF_K + byte, mask=byte < HALF_K, other=0)
    scales = group_numbers(sw + channels.to(tl.int64) * GROUPS, start, K, GROUP, BK, WEIGHT == "nvfp4")
    channel = tl.load(aux + N + channels)[:, None] if WEIGHT == "nvfp4" else 0.0
    value = weights(b, scales, 0.0, channel, WEIGHT)
    return whole_codes(value, s_ch[:, None], -127.0, 127.0).to(tl.int8)


@triton.jit
def expand_kernel(qw, sw, aux, w8, N, K, HALF_K, GROUPS, EVEN: tl.constexpr, WEIGHT: tl.constexpr, GROUP: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr):
    """w8 (N,K) of a 4-bit weight, a tile to a program."""
    channels = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    inside = channels < N
    channels = tl.minimum(channels, N - 1)
    tile = expanded(qw, sw, aux, channels, tl.load(aux + channels), start, N, K, HALF_K, GROUPS, EVEN, WEIGHT, GROUP,
                    BK)
    k = start + tl.arange(0, BK)
    tl.store(w8 + channels[:, None].to(tl.int64) * K + k[None, :], tile, mask=inside[:, None] & (k < K)[None, :])
