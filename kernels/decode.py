"""Tiles of codes and scales → numbers."""
import triton
import triton.language as tl


@triton.jit
def nibbles(b, SIGNED: tl.constexpr):
    """(low, high) int8 of two codes a byte."""
    if SIGNED:
        return (b << 4).to(tl.int8, bitcast=True) >> 4, b.to(tl.int8, bitcast=True) >> 4
    else:
        return (b & 15).to(tl.int8, bitcast=True), (b >> 4).to(tl.int8, bitcast=True)


@triton.jit
def sixteenfold(b):
    """(low, high) int8 of two signed codes a byte, times 16: they need no shift back."""
    return (b << 4).to(tl.int8, bitcast=True), (b & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def in_order(b, SIGNED: tl.constexpr):
    """int8 (rows, k) of bytes (rows, k/2)."""
    low, high = nibbles(b, SIGNED)
    return tl.interleave(low, high)


@triton.jit
def e2m1(codes):
    """fp32 of codes 0 … 15: bit 3 the sign, the rest one of 0 .5 1 1.5 2 3 4 6."""
    code = codes.to(tl.int32) & 7
    twice = tl.maximum(tl.maximum(code, (code << 1) - 4), (code << 2) - 16)
    return tl.where((codes & 8) != 0, -twice, twice).to(tl.float32) * 0.5


@triton.jit
def e4m3(bits):
    """fp32 of the bits (uint8) of float8_e4m3fn, by whole numbers: GPUs before 8.9 know no such type."""
    size = bits.to(tl.int32) & 0x7F
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: from one exponent to the other
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where((bits & 0x80) != 0, -value, value)


@triton.jit
def over_groups(scales, GROUP: tl.constexpr):
    """(rows, k) of scales (rows, k/GROUP): each over its group."""
    rows: tl.constexpr = scales.shape[0]
    groups: tl.constexpr = scales.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(scales, 2), (rows, groups, GROUP))
    return tl.reshape(wide, (rows, groups * GROUP))


@triton.jit
def stored(numbers, E4M3: tl.constexpr):
    """fp32 of scales or zeros as they lie in memory."""
    if E4M3:
        return e4m3(numbers)
    else:
        return numbers.to(tl.float32)


@triton.jit
def group_numbers(at, start, K, GROUP: tl.constexpr, BK: tl.constexpr, E4M3: tl.constexpr):
    """fp32 (rows, BK) for the inputs from `start` on: of rows whose numbers begin at the pointers `at`, one a group."""
    if GROUP >= BK:
        return tl.expand_dims(stored(tl.load(at + start // GROUP), E4M3), 1)
    else:
        group = start // GROUP + tl.arange(0, BK // GROUP)
        inside = group * GROUP < K
        numbers = tl.load(tl.expand_dims(at, 1) + group[None, :], mask=inside[None, :], other=0)
        return over_groups(stored(numbers, E4M3), GROUP)


@triton.jit
def weights(b, scales, zeros, channel, WEIGHT: tl.constexpr):
    """fp32 (rows, k) of bytes (rows, k/2): code·scale + zero, ·channel; in the order of formats.decode."""
    codes = in_order(b, WEIGHT == "int4")
    if WEIGHT == "nvfp4":
        return e2m1(codes) * scales * channel
    elif WEIGHT == "uint4":
        return codes.to(tl.float32) * scales + zeros
    else:
        return codes.to(tl.float32) * scales
