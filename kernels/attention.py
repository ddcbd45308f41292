"""attention in 8 bit: q and k in int8, P·V in FP8 or in 16 bit, everything else in fp32.

    softmax(scale·q·kᵀ) = softmax(scale·(H·r·q)·(H·(k − μ)/r)ᵀ/D)

μ (D): the mean of k over the keys, which shifts all scores of a query alike, so that softmax does not see it; int8
does, as channels of k often are far from zero. r (D): makes q and k equally large in each channel. H (D,D): Hadamard's
±1, H·Hᵀ = D, spreads what is larger in some channels over all.

Four launches: sums over parts of tokens and keys; k, and v for FP8, quantized; q; then a block of queries at a time
goes over all keys, with a running maximum. Sums are made in a fixed order: the same inputs give the same bits.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nunchaku_py.ops.attention import empty_output
from nunchaku_py.ops.spec import AttentionSpec

from . import launch
from .attention_config import CHOICES, problem_of
from .config import Config, blocks, choose
from .gpu import gpu_of
from .numbers import WHOLE, sizes

PARTS = 16  # of the keys, whose sums are made at once
QUERIES = 64  # that a block quantizes
PART_ROWS = 32  # rows that are added to a sum at a time
LOG2_E = math.log2(math.e)
TINY = tl.constexpr(1e-30)  # what 127/x is finite above; below everything is zero
MOST_BALANCED = tl.constexpr(10)  # 2^10: float16 reaches from 2^-14 to 2^16
FP8_TOP = tl.constexpr(448.0)
FP8_SHIFT = tl.constexpr(8.0)  # P is multiplied by 2^8: e4m3 is normal down to 2^-6, so P down to 2^-14; and 1 is exact


# -------------------------------------------------------------------------------------------------------------- numbers
@triton.jit
def hadamard(powers, D: tl.constexpr, TYPE: tl.constexpr):
    """(D,D) of ±1, minus where i and j have an odd number of bits in common; row i times a power of two, powers[i]: so
    that it is products that are multiplied by it, in fp32, and not numbers that float16 cannot hold then."""
    common = tl.arange(0, D)[:, None] & tl.arange(0, D)[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return ((1 - 2 * (common & 1)).to(tl.float32) * powers[:, None]).to(TYPE)


@triton.jit
def as_float(size):
    return size.to(tl.float32, bitcast=True)


@triton.jit
def times_for(top, most: tl.constexpr):
    """most/top, and zero where there is nothing to divide by."""
    return tl.where(top > TINY, tl.math.div_rn(most, tl.where(top > TINY, top, 1.0)), 0.0)


@triton.jit
def int8_of(x):
    """x, |x| ≤ 127, rounded half to even; something of NaN, whose scale says what it is."""
    return (x + WHOLE).to(tl.int32, bitcast=True).to(tl.int8)


# ----------------------------------------------------------------------------------------------------------- statistics
@triton.jit
def part_moments(x, stride, first, last, D: tl.constexpr, N: tl.constexpr):
    """(D) sum and sum of squares of x (·,D), rows first to last, without what is no finite number."""
    channel, row = tl.arange(0, D)[None, :], tl.arange(0, N)[:, None]
    total, squares = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32)
    for start in range(first, last, N):
        rows = (start + row).to(tl.int64)
        value = tl.load(x + rows * stride + channel, mask=rows < last, other=0.0).to(tl.float32)
        total += value
        squares += tl.where(tl.abs(value) < float("inf"), value * value, 0.0)
    return tl.sum(total, 0), tl.sum(squares, 0)


@triton.jit
def part_top(x, stride, first, last, D: tl.constexpr, N: tl.constexpr):
    """(D) the largest |x|."""
    channel, row = tl.arange(0, D)[None, :], tl.arange(0, N)[:, None]
    top = tl.zeros((N, D), tl.int32)
    for start in range(first, last, N):
        rows = (start + row).to(tl.int64)
        value = tl.load(x + rows * stride + channel, mask=rows < last, other=0.0)
        top = tl.maximum(top, sizes(value.to(tl.float32), False))
    return as_float(tl.max(top, 0))


@triton.jit
def statistics(
    q, k, v, parts, qb, qh, qs, kb, kh, ks, vb, vh, vs, heads, tokens, keys, part_tokens, part_keys,
    D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
):
    """parts (B·H,4,PARTS,D) fp32: of each part of tokens or keys Σq², Σk, Σk², and for FP8 the largest |v|."""
    part, head = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS).to(tl.int64)
    batch, own = head // heads, head % heads
    to = parts + (head * 4 * PARTS + part) * D + tl.arange(0, D)
    first, last = part * part_tokens, min((part + 1) * part_tokens, tokens)
    _, squares = part_moments(q + batch * qb + own * qh, qs, first, last, D, N)
    tl.store(to, squares)
    first, last = part * part_keys, min((part + 1) * part_keys, keys)
    total, squares = part_moments(k + batch * kb + own * kh, ks, first, last, D, N)
    tl.store(to + PARTS * D, total)
    tl.store(to + 2 * PARTS * D, squares)
    if FP8:
        tl.store(to + 3 * PARTS * D, part_top(v + batch * vb + own * vh, vs, first, last, D, N))


@triton.jit
def balance(q_square, k_square):
    """What q is multiplied by and k divided: (σ(k)/σ(q))^½, after which both are as large in a channel. A power of two,
    which changes no bit of what it multiplies. Where one of them is nothing, as is a k that is the same everywhere, the
    other matters as little, however large it is."""
    known = (q_square < float("inf")) & (k_square < float("inf"))
    doubled = tl.log2(tl.where(known & (k_square > TINY), k_square, TINY))
    doubled -= tl.log2(tl.where(known & (q_square > TINY), q_square, TINY))
    power = tl.floor(0.25 * doubled + 0.5).to(tl.int32)
    power = tl.minimum(tl.maximum(power, -MOST_BALANCED), MOST_BALANCED)
    return ((127 + power) << 23).to(tl.float32, bitcast=True), ((127 - power) << 23).to(tl.float32, bitcast=True)


# ----------------------------------------------------------------------------------------------------------------- keys
@triton.jit
def quantize_keys(
    k, v, parts, k8, sk, v8, sv, rq, kb, kh, ks, vb, vh, vs, heads, tokens, keys, tiles,
    D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
):
    """k8 (B·H,S',D) int8 of H·(k − μ)/r, with sk (B·H,S') fp32 a scale for each key, and rq (B·H,D) fp32, the r; for
    FP8 v8 (B·H,D,S') e4m3, with sv (B·H,D) fp32. S': whole tiles of keys, those beyond the last zero."""
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    k += head // heads * kb + head % heads * kh
    v += head // heads * vb + head % heads * vh
    channel, part = tl.arange(0, D), tl.arange(0, PARTS)
    row = tile * N + tl.arange(0, N)
    rows, there = row[:, None].to(tl.int64), row[:, None] < keys
    parts += (head * 4 * PARTS + part[:, None]) * D + channel[None, :]
    exact = tl.sum(tl.load(parts + PARTS * D), 0) / keys
    q_square = tl.sum(tl.load(parts), 0) / tokens
    k_square = tl.maximum(tl.sum(tl.load(parts + 2 * PARTS * D), 0) / keys - exact * exact, 0.0)
    to_q, to_k = balance(q_square, k_square)
    x = tl.load(k + rows * ks + channel[None, :], mask=there, other=0.0)
    # Rounded, so that it can be multiplied as k is: any vector may be taken off, as long as it is the same everywhere.
    mean = tl.broadcast_to(exact.to(x.dtype)[None, :], (16, D))
    turn = hadamard(to_k, D, x.dtype)
    turned = tl.dot(x, turn) - (tl.sum(tl.dot(mean, turn), 0) * 0.0625)[None, :]
    turned = tl.where(there, turned, 0.0)
    top = as_float(tl.max(sizes(turned, False), 1))
    codes = int8_of(turned * times_for(top, 127.0)[:, None])
    tl.store(k8 + (head * tiles * N + rows) * D + channel[None, :], codes)
    tl.store(sk + head * tiles * N + row, tl.math.div_rn(top, 127.0))
    tl.store(rq + head * D + channel, to_q, mask=channel < tl.where(tile == 0, D, 0))
    if FP8:
        largest = as_float(tl.max(sizes(tl.load(parts + 3 * PARTS * D), False), 0))
        value = tl.load(v + rows * vs + channel[None, :], mask=there, other=0.0).to(tl.float32)
        code = (value * times_for(largest, FP8_TOP)[None, :]).to(v8.dtype.element_ty)
        tl.store(v8 + (head * D + channel[:, None]) * tiles * N + row[None, :], tl.trans(code))
        tl.store(sv + head * D + channel, tl.math.div_rn(largest, FP8_TOP), mask=channel < tl.where(tile == 0, D, 0))


# -------------------------------------------------------------------------------------------------------------- queries
@triton.jit
def quantize_queries(
    q, rq, q8, sq, qb, qh, qs, heads, tokens, tiles, scale, D: tl.constexpr, M: tl.constexpr,
):
    """q8 (B·H,T,D) int8 of H·q·r·scale, with sq (B·H,T) fp32 a scale for each token."""
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    channel, row = tl.arange(0, D), tile * M + tl.arange(0, M)
    there = row < tokens
    q += head // heads * qb + head % heads * qh
    x = tl.load(q + row[:, None].to(tl.int64) * qs + channel[None, :], mask=there[:, None], other=0.0)
    turned = tl.dot(x, hadamard(tl.load(rq + head * D + channel), D, x.dtype)) * scale
    top = as_float(tl.max(sizes(turned, False), 1))
    to = head * tokens + row
    codes = int8_of(turned * times_for(top, 127.0)[:, None])
    tl.store(q8 + to[:, None] * D + channel[None, :], codes, mask=there[:, None])
    tl.store(sq + to, tl.math.div_rn(top, 127.0), mask=there)


@triton.jit
def add_keys(
    q8, sq, k8, sk, v, v8, start, keys, padded, vs, acc, total, most,
    D: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, IMPRECISE: tl.constexpr, LAST: tl.constexpr,
):
    """acc, total and most after N more keys, of which in the last tile some may not be there.

    most is the largest score so far, in powers of two, as all scores are: acc and total are in units of 2^most."""
    channel, row = tl.arange(0, D), start + tl.arange(0, N)
    codes = tl.load(k8 + row[:, None] * D + channel[None, :])
    # A scale for each key costs a product for each score. With one for all of a tile, a single large key, such as the
    # first of a text often is, would round the others to nothing.
    powers = tl.dot(q8, tl.trans(codes), out_dtype=tl.int32).to(tl.float32) * tl.load(sk + row)[None, :]
    if LAST:
        powers = tl.where(row[None, :] < keys, powers, -float("inf"))
    now = tl.maximum(most, tl.max(powers, 1) * sq)
    p = tl.exp2(powers * sq[:, None] - (now - (FP8_SHIFT if FP8 else 0.0))[:, None])
    fade = tl.exp2(most - now)
    total = total * fade + tl.sum(p, 1)
    if FP8:
        value = tl.load(v8 + channel[:, None].to(tl.int64) * padded + row[None, :])
        # A sum of its own for these keys: tensor cores add FP8 products with some 13 bits after the point (9.0, 8.9).
        acc = acc * fade[:, None] + tl.dot(
            p.to(v8.dtype.element_ty), tl.trans(value), max_num_imprecise_acc=IMPRECISE)
    else:
        rows = row[:, None].to(tl.int64)
        if LAST:
            value = tl.load(v + rows * vs + channel[None, :], mask=row[:, None] < keys, other=0.0)
        else:
            value = tl.load(v + rows * vs + channel[None, :])
        acc = tl.dot(p.to(v.dtype.element_ty), value, acc * fade[:, None])
    return acc, total, now


@triton.jit
def attend(
    q8, sq, k8, sk, v, v8, sv, o, vb, vh, vs, ob, oh, os, heads, tokens, keys, padded,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, IMPRECISE: tl.constexpr, TAIL: tl.constexpr,
):
    """o (B,H,T,D) for M queries of one head. FP8: v8 and sv are read, else v. TAIL: the last N keys are not whole."""
    tiles = tl.cdiv(tokens, M)
    tile, head = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    batch, own = head // heads, head % heads
    v, o = v + batch * vb + own * vh, o + batch * ob + own * oh
    k8, v8, sk = k8 + head * padded * D, v8 + head * padded * D, sk + head * padded
    rows, channel = tile * M + tl.arange(0, M), tl.arange(0, D)
    there = rows < tokens
    own_q8 = tl.load(q8 + (head * tokens + rows[:, None]) * D + channel[None, :], mask=there[:, None], other=0)
    own_sq = tl.load(sq + head * tokens + rows, mask=there, other=0.0)
    own_sq = tl.where(own_sq == 0, TINY, own_sq)  # of a query of zeros: an infinity times 0 were NaN
    acc, total = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    most = tl.full((M,), -float("inf"), tl.float32)
    whole = keys // N * N
    for start in range(0, whole, N):
        acc, total, most = add_keys(
            own_q8, own_sq, k8, sk, v, v8, start, keys, padded, vs, acc, total, most, D, N, FP8, IMPRECISE, False)
    if TAIL:
        acc, total, most = add_keys(
            own_q8, own_sq, k8, sk, v, v8, whole, keys, padded, vs, acc, total, most, D, N, FP8, IMPRECISE, True)
    acc *= tl.math.div_rn(1.0, total)[:, None]
    if FP8:
        acc *= tl.load(sv + head * D + channel)[None, :]
    to = o + rows[:, None].to(tl.int64) * os + channel[None, :]
    tl.store(to, acc.to(o.dtype.element_ty), mask=there[:, None])


# ------------------------------------------------------------------------------------------------------------- launches
class Keys(NamedTuple):
    """What the queries' kernel reads of k and v; and rq, by which q is multiplied."""

    k8: Tensor
    sk: Tensor
    v8: Tensor
    sv: Tensor
    rq: Tensor


def part_of(rows: int) -> int:
    """How many of them are a part."""
    return blocks(blocks(rows, PARTS), PART_ROWS) * PART_ROWS


def empty_keys(k: Tensor, block: int, fp8: bool) -> Keys:
    batch, heads, keys, dim = k.shape
    count, tiles = batch * heads, blocks(keys, block)
    sk, sv, rq = (k.new_empty(shape, dtype=torch.float32) for shape in (
        (count, tiles * block), (count, dim if fp8 else 0), (count, dim)))
    v8 = k.new_empty((count, dim, tiles * block if fp8 else 0), dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    return Keys(k.new_empty((count, tiles * block, dim), dtype=torch.int8), sk, v8, sv, rq)


def quantized_keys(q: Tensor, k: Tensor, v: Tensor, block: int, fp8: bool) -> Keys:
    """k (B,H,S,D) with a scale for each key, in tiles of `block`; for FP8 v (B,H,S,D) too, transposed."""
    batch, heads, tokens, dim = q.shape
    count, keys, found = batch * heads, k.shape[2], empty_keys(k, block, fp8)
    parts, tiles = found.sk.new_empty(count, 4, PARTS, dim), blocks(keys, block)
    strides, static = (*k.stride()[:3], *v.stride()[:3]), {"D": dim, "PARTS": PARTS, "FP8": fp8}
    launch.launch(statistics, (count * PARTS,), q, k, v, parts, *q.stride()[:3], *strides, heads, tokens, keys,
                  part_of(tokens), part_of(keys), warps=4, N=PART_ROWS, **static)
    launch.launch(quantize_keys, (count * tiles,), k, v, parts, *found, *strides, heads, tokens, keys, tiles,
                  warps=4 if block * dim < 4096 else 8, N=block, **static)
    return found


def quantized_queries(q: Tensor, rq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q8 (B·H,T,D) and sq (B·H,T), in which scores are powers of two."""
    batch, heads, tokens, dim = q.shape
    count, tiles = batch * heads, blocks(tokens, QUERIES)
    q8, sq = q.new_empty((count, tokens, dim), dtype=torch.int8), rq.new_empty(count, tokens)
    launch.launch(quantize_queries, (count * tiles,), q, rq, q8, sq, *q.stride()[:3], heads, tokens, tiles,
                  scale * LOG2_E / dim, warps=4 if QUERIES * dim <= 4096 else 8, D=dim, M=QUERIES)
    return q8, sq


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, fp8: bool, config: Config | None = None) -> Tensor:
    """o (B,H,T,D), laid out as the op says, with P·V in FP8 or in the dtype of q."""
    gpu, o = gpu_of(q), empty_output(q)
    (batch, heads, tokens, dim), keys = q.shape, k.shape[2]
    config = config or choose(CHOICES, problem_of(batch * heads, tokens, keys, dim, fp8), gpu)
    if not o.numel():
        return o
    found = quantized_keys(q, k, v, config.n, fp8)
    q8, sq = quantized_queries(q, found.rq, spec.scale_of(dim))
    # Triton begins the sum of a product from what it is added to, but for FP8 on 9.0; and anywhere where it is told
    # that tensor cores may add so many products with few bits: then the product has a sum of its own.
    imprecise = None if gpu.capability[0] == 9 else config.n
    launch.launch(
        attend, (batch * heads * blocks(tokens, config.m),), q8, sq, found.k8, found.sk, v, found.v8, found.sv, o,
        *v.stride()[:3], *o.stride()[:3], heads, tokens, keys, found.k8.shape[1], warps=config.warps,
        stages=config.stages, D=dim, M=config.m, N=config.n, FP8=fp8, IMPRECISE=imprecise, TAIL=keys % config.n != 0)
    return o
