"""Codes and scales of fp32 tiles, to the bit as nunchaku_py/formats.py says: what every kernel that quantizes shares.

To be launched with launch.EXACT. Divisions are rounded correctly (`/` is not, on GPUs). Floats are rounded to few bits
by integers: GPUs before 8.9 have no conversion to e4m3, and it is the same everywhere.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .decode import e4m3

SIZE = tl.constexpr(0x7FFFFFFF)  # the bits of fp32 without its sign
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
WHOLE = tl.constexpr(12582912.0)  # 1.5·2^23: the last bits of v + WHOLE are v rounded half to even, in two's complement
NO_E4M3 = tl.constexpr(0x7F)  # NaN


@triton.jit
def sizes(v, UNSIGNED: tl.constexpr):
    """int32: the bits of |v|, unsigned: of max(v, 0). They are ordered as the numbers are, and what is no finite number
    is above all that are, unlike in maxima of floats on GPUs."""
    bits = v.to(tl.int32, bitcast=True)
    size = bits & SIZE
    if UNSIGNED:
        return tl.where((bits >= 0) | (size >= INFINITY), size, 0)
    return size


@triton.jit
def divided_top(size, top: tl.constexpr):
    """fp32 of the largest of sizes(…): it/top, NaN if it is not finite."""
    quotient = tl.math.div_rn(size.to(tl.float32, bitcast=True), top)
    return tl.where(size < INFINITY, quotient, tl.full(size.shape, NAN, tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def rounded_scale(scale, SCALE: tl.constexpr):
    """scale as float16 or bfloat16; too large a one becomes the largest that is finite."""
    largest: tl.constexpr = 65504.0 if SCALE == tl.float16 else 3.3895313892515355e38
    return tl.where(scale > largest, largest, scale).to(SCALE)


@triton.jit
def e4m3_of(scale):
    """int32: the bits of e4m3 of what is not negative; 448 for all above."""
    bits = tl.where(scale > 448.0, 448.0, scale).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    steps = (scale + 24576.0).to(tl.int32, bitcast=True) & 0xF  # of 2^-9, the last bit of 1.5·2^14
    code = tl.where(scale < 0.015625, steps, normal)
    return tl.where(bits < INFINITY, code, NO_E4M3)


@triton.jit
def quotient(v, scale):
    """v/scale, rounded correctly where it is 1/4 or more, which is where that may decide a code; of scales that are not
    positive the codes are 0 anyway.

    With 1/scale rounded correctly, two corrections by what is left of v give what a division gives (Markstein), for
    half its cost. Powers of two keep all of it within the normal numbers.
    """
    lift = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)  # 2^-60, 2^64
    lift = tl.where(scale > 1.152921504606847e18, 5.421010862427522e-20, lift)  # 2^60, 2^-64
    v, scale = v * lift, tl.where(scale > 0, scale, 1.0) * lift
    inverse = tl.math.div_rn(1.0, scale)
    scale, inverse = tl.broadcast_to(scale, v.shape), tl.broadcast_to(inverse, v.shape)
    q = v * inverse
    q = tl.fma(tl.fma(-q, scale, v), inverse, q)
    return tl.fma(tl.fma(-q, scale, v), inverse, q)


@triton.jit
def whole_codes(v, scale, lowest: tl.constexpr, top: tl.constexpr):
    """int32: v/scale, clamped, rounded, in two's complement in its last bits; 0 where the scale is zero or NaN."""
    q = tl.minimum(tl.maximum(quotient(v, scale), lowest), top)
    return tl.where(scale > 0, (q + WHOLE).to(tl.int32, bitcast=True), 0)


@triton.jit
def e2m1_codes(v, scale):
    """int32: e2m1 of v/scale, which keeps its sign if it rounds to zero; 0 where the scale is zero or NaN."""
    size = tl.minimum(tl.abs(quotient(v, scale)), 6.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    halves = (size + 6291456.0).to(tl.int32, bitcast=True) & 3  # the last bit of 1.5·2^22
    sign = (v.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(scale > 0, tl.where(size < 1.0, halves, normal) | sign, 0)


@triton.jit
def packed_nibbles(codes):
    """uint8 (BM, BK/2) of the last four bits of codes (BM, BK): even k in the low nibble."""
    even, odd = tl.split(codes.reshape(codes.shape[0], codes.shape[1] // 2, 2))
    return ((even & 0xF) | ((odd & 0xF) << 4)).to(tl.uint8)


@triton.jit
def quantize_groups(v, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """Of x̂, an fp32 tile (BM, BK) of whole groups: codes, two in a byte, uint8 (BM, BK/2); scales (BM, BK/GROUP), of
    type SCALE, or e4m3's bits as uint8.

    FORMAT "int4", "uint4" or "nvfp4". What stands beyond a row's end is to be +0.
    """
    BM: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    groups = v.reshape(BM, BK // GROUP, GROUP)
    top = tl.max(sizes(groups, FORMAT == "uint4"), 2)
    if FORMAT == "nvfp4":
        bits = e4m3_of(divided_top(top, 6.0))
        scale = tl.where(bits < NO_E4M3, e4m3(bits), 0.0)
        codes = e2m1_codes(groups, scale[:, :, None])
        stored = bits.to(tl.uint8)
    else:
        stored = rounded_scale(divided_top(top, 15.0 if FORMAT == "uint4" else 7.0), SCALE)
        lowest: tl.constexpr = 0.0 if FORMAT == "uint4" else -7.0
        codes = whole_codes(groups, stored.to(tl.float32)[:, :, None], lowest, 15.0 if FORMAT == "uint4" else 7.0)
    return packed_nibbles(codes.reshape(BM, BK)), stored


@triton.jit
def int8_scale(size):
    """fp32 (BM) of the largest of sizes(x̂, False) of each row."""
    return divided_top(size, 127.0)


@triton.jit
def quantize_int8(v, scale):
    """int8 (BM, BK) of x̂ (BM, BK) fp32 with a scale for each row (BM)."""
    return whole_codes(v, scale[:, None], -127.0, 127.0).to(tl.int8)
