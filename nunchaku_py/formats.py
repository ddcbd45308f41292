"""Number formats, and quantization to and from them in plain torch.

A matrix x (M,K) is stored as codes (M,K) and scales (M,G), one scale for every `group` neighbours of a row
(G = ceil(K/group), the last group may be short; group 0 is one scale for the whole row):

    int4   x ≈ code·scale            code −7..7 (−8 is understood when read)
    uint4  x ≈ code·scale + zero     code 0..15; activations have no zero
    nvfp4  x ≈ e2m1(code)·scale      code 0..15: bit 3 the sign, the rest one of 0 .5 1 1.5 2 3 4 6; scale float8_e4m3fn
    int8   x ≈ code·scale            code −127..127

All arithmetic is fp32. The scale is rounded to its stored type first, and the stored scale is used both to quantize and
to dequantize; rounding is half-to-even. A group whose scale is zero (all zeros, or too small for the scale's type) has
codes 0. A group that holds NaN or an infinity gets a NaN scale and codes 0, so that whatever is computed from it is NaN
and not a plausible number. A finite scale too large for its type becomes the largest of that type; the codes saturate.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import NunchakuError

FormatName = Literal["int4", "uint4", "nvfp4", "int8"]
TOP = {"int4": 7, "uint4": 15, "nvfp4": 6, "int8": 127}  # the largest value of a code
LOWEST = {"int4": -7, "uint4": 0, "nvfp4": -6, "int8": -127}
MOST_STEPS = 144  # a weight that fold_int8 may cut off is at most so many steps large
CHUNK = 2**20  # elements worked on at a time: temporaries of a few MB stay in the cache


@dataclass(frozen=True)
class Format:
    """How one matrix is stored; `group` 0 means one scale for the whole row."""

    name: FormatName
    group: int

    def __post_init__(self) -> None:
        if self.name not in get_args(FormatName):
            raise NunchakuError(f"format: expected one of {', '.join(get_args(FormatName))}, got {self.name!r}")
        if self.group < 0:
            raise NunchakuError(f"format {self.name}: expected a group of at least 0, got {self.group}")

    @property
    def top(self) -> int:
        return TOP[self.name]

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.name != "int8"

    def scale_dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The stored type of a scale: nvfp4 and int8 fix it, the others follow `wanted`."""
        return {"nvfp4": torch.float8_e4m3fn, "int8": torch.float32}.get(self.name, wanted)


INT4 = Format("int4", 64)
UINT4 = Format("uint4", 64)
NVFP4 = Format("nvfp4", 16)
INT8 = Format("int8", 0)
FORMATS = {f.name: f for f in (INT4, UINT4, NVFP4, INT8)}


@cache
def format_of(name: str, group: int | None = None) -> Format:
    """The format called `name`, with its usual group unless another is given."""
    if group is None and name in FORMATS:
        return FORMATS[name]
    return Format(name, group or 0)


def group_count(k: int, group: int) -> int:
    return -(-k // group) if group else 1


def row_chunks(rows: int, k: int, elements: int = CHUNK) -> Iterator[slice]:
    """Slices that cut `rows` rows of k into pieces of about `elements`."""
    step = max(1, elements // max(k, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def grouped(x: Tensor, group: int) -> Iterator[tuple[Tensor, slice]]:
    """Views (M, groups, size) of the whole groups and of the short last one, each with the columns of its scales."""
    k = x.shape[1]
    size = group or k
    whole = k // size if size else 0
    if whole:
        yield x[:, : whole * size].unflatten(1, (whole, size)), slice(0, whole)
    if size and k % size:
        yield x[:, whole * size :].unsqueeze(1), slice(whole, whole + 1)


def mul_groups_(x: Tensor, scales: Tensor, group: int) -> Tensor:
    """x·scale in place, each group with its own."""
    for block, columns in grouped(x, group):
        block.mul_(scales[:, columns].unsqueeze(-1))
    return x


def div_groups_(x: Tensor, scales: Tensor, group: int) -> Tensor:
    for block, columns in grouped(x, group):
        block.div_(scales[:, columns].unsqueeze(-1))
    return x


def sum_groups(x: Tensor, group: int) -> Tensor:
    """The sum of each group, (M,G)."""
    out = x.new_zeros(x.shape[0], group_count(x.shape[1], group))
    for block, columns in grouped(x, group):
        out[:, columns] = block.sum(-1)
    return out


def group_top(x: Tensor, fmt: Format) -> Tensor:
    """What the largest code of each group stands for, (M,G): max|x|, uint4: max(x, 0); NaN where x is not finite."""
    out = x.new_zeros(x.shape[0], group_count(x.shape[1], fmt.group))
    for block, columns in grouped(x, fmt.group):
        low, high = torch.aminmax(block, dim=-1)
        out[:, columns] = high.clamp_min(0) if fmt.name == "uint4" else torch.maximum(low.neg(), high)
        out[:, columns] += (low - low) + (high - high)  # 0 when finite, NaN when not
    return out


def divided(x: Tensor, by: float) -> Tensor:
    """x/by, rounded once on every device: by a number that is no tensor there, CUDA multiplies by 1/by."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale in its stored type; too large a one becomes the largest that is finite."""
    return scale.clamp(max=torch.finfo(dtype).max).to(dtype)


def round_codes_(v: Tensor, fmt: Format) -> Tensor:
    """v in place to the nearest value a code can stand for, half to even."""
    v.clamp_(LOWEST[fmt.name], fmt.top)
    if fmt.name != "nvfp4":
        return v.round_()
    # e2m1 has one mantissa bit, and steps of 1/2 below 1: with 2^e <= |v|, adding and taking away 1.5·2^23 steps of
    # max(2^e, 1)/2 leaves the nearest step, ties to the even one, which is the even code.
    magic = (v.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(1.0).mul_(0.75 * 2**23)
    return v.add_(magic).sub_(magic)


def _to_codes(v: Tensor, fmt: Format) -> Tensor:
    """Codes of v = x/scale; consumes v."""
    if fmt.name != "nvfp4":
        return round_codes_(v, fmt).to(torch.int8)
    sign = v.signbit().view(torch.int8) << 3  # kept for what rounds to zero, as cvt.rn.satfinite.e2m1x2 does
    twice = round_codes_(v, fmt).abs_().mul_(2).to(torch.int8)  # 0 1 2 3 4 6 8 12
    magnitude = torch.minimum(torch.minimum(twice, (twice >> 1) + 2), (twice >> 2) + 4)
    return magnitude.bitwise_or_(sign)


def _from_codes(codes: Tensor, fmt: Format) -> Tensor:
    """fp32 values of codes, before any scale."""
    if fmt.name != "nvfp4":
        return codes.to(torch.float32)
    code = codes & 7
    twice = torch.maximum(torch.maximum(code, (code << 1) - 4), (code << 2) - 16)
    sign = -((codes >> 3) & 1)
    return ((twice ^ sign) - sign).to(torch.float32).mul_(0.5)


def encode(x: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Codes int8 of x (M,K) for stored scales (M,G): round(x/scale). Zeros and channel scales the caller takes off."""
    _check_scales(x, scales, fmt)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    for rows in row_chunks(*x.shape):
        divisor = scales[rows].float()
        block = x[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        codes[rows] = _to_codes(div_groups_(block, divisor, fmt.group), fmt)
        _clear_(codes[rows], divisor, fmt.group)
    return codes


def _clear_(codes: Tensor, scales: Tensor, group: int) -> None:
    """Codes 0 where the scale is zero or NaN and the division meant nothing."""
    void = (scales == 0) | scales.isnan()
    if void.any():
        for block, columns in grouped(codes, group):
            block.masked_fill_(void[:, columns].unsqueeze(-1), 0)


def decode(
    codes: Tensor, scales: Tensor, fmt: Format, zeros: Tensor | None = None, channel_scale: Tensor | None = None
) -> Tensor:
    """fp32 (N,K) of unpacked codes: code·scale, + zero (N,G), ·channel_scale (N)."""
    _check_scales(codes, scales, fmt)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in row_chunks(*codes.shape):
        block = mul_groups_(_from_codes(codes[rows], fmt), scales[rows].float(), fmt.group)
        if zeros is not None:
            for part, columns in grouped(block, fmt.group):
                part.add_(zeros[rows, columns].float().unsqueeze(-1))
        if channel_scale is not None:
            block.mul_(channel_scale[rows].float().unsqueeze(-1))
        out[rows] = block
    return out


def _check_scales(x: Tensor, scales: Tensor, fmt: Format) -> None:
    expected = (x.shape[0], group_count(x.shape[1], fmt.group))
    if scales.shape != expected:
        raise NunchakuError(f"scales: expected (rows, groups) = {expected}, got {tuple(scales.shape)}")


def quantize_rows(x: Tensor, fmt: Format, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The dynamic rule for activations: codes (M,K) int8 and stored scales (M,G) of x (M,K), max/7, /15, /6 or /127."""
    scales = round_scale(divided(group_top(x.float(), fmt), fmt.top), fmt.scale_dtype(scale_dtype))
    return encode(x, scales, fmt), scales


def fold_int8(
    codes: Tensor, scales: Tensor, fmt: Format, zeros: Tensor | None = None, channel_scale: Tensor | None = None,
    s_ch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same weights as w8 (N,K) int8 and one scale per row s_ch (N) fp32: w8 = round(w/s_ch), saturated.

    s_ch = max|w|/127; of an nvfp4 row the one with the least squared error Σ(w − w8·s_ch)², of that and two that its
    own grid gives (_best_steps). Whoever knows it already gives it."""
    w8 = torch.empty(codes.shape, dtype=torch.int8, device=codes.device)
    found = torch.empty(codes.shape[0], dtype=torch.float32, device=codes.device) if s_ch is None else s_ch
    _check_scales(codes, scales, fmt)
    for rows in row_chunks(*codes.shape, CHUNK if codes.device.type == "cpu" else 16 * CHUNK):
        taken = [None if t is None else t[rows] for t in (zeros, channel_scale)]
        w = decode(codes[rows], scales[rows], fmt, *taken)
        if s_ch is None:
            found[rows] = _fold_steps(w, codes[rows], scales[rows], fmt, taken[1])
        w8[rows] = encode(w, found[rows].unsqueeze(1), INT8)
    return w8, found


def _fold_steps(w: Tensor, codes: Tensor, scales: Tensor, fmt: Format, channel: Tensor | None) -> Tensor:
    """s_ch of some rows w."""
    top = group_top(w, INT8)[:, 0]
    if fmt.name != "nvfp4":
        return divided(top, INT8.top)
    return _best_steps(codes, scales, fmt, torch.ones_like(top) if channel is None else channel.float(), top)


def _best_steps(codes: Tensor, scales: Tensor, fmt: Format, channel: Tensor, top: Tensor) -> Tensor:
    """s_ch (N) of nvfp4 rows whose largest weight is `top` (N) and whose channel_scale is `channel` (N).

    A scale is m·2^e with m = 8 … 15 and a code counts halves: a row's weights are whole multiples of channel·2^j, many
    of them of three halves of it. With such a step many groups fold without error, which is worth a step a little
    larger than max/127, or a largest weight that is cut off a little: from 144 = 12·12 steps to 127. The next larger
    of both kinds competes with max/127."""
    sizes, plain = _from_codes(codes & 7, fmt), divided(top, INT8.top)
    best, least = plain, _fold_error(sizes, scales, fmt, channel / plain)
    for part in (1.0, 1.5):
        step = channel * (_power_of_two_above(divided(divided(top, MOST_STEPS) / channel, part)) * part)
        ratio = step / plain
        error = _fold_error(sizes, scales, fmt, channel / step) * (ratio * ratio)
        better = (error < least) & (step > 0) & (plain >= torch.finfo(torch.float32).tiny)
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def _power_of_two_above(x: Tensor) -> Tensor:
    """The least power of two that is no smaller than x (fp32, positive and normal)."""
    return ((x.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _fold_error(sizes: Tensor, scales: Tensor, fmt: Format, factor: Tensor) -> Tensor:
    """Σ(32·e)² fp32 (N), e what a weight is off in steps, 32·e rounded: sums of whole numbers have no order."""
    steps = mul_groups_(sizes.clone(), scales.float() * factor.unsqueeze(1), fmt.group)
    off = steps.sub_(steps.clamp(max=INT8.top).round_())
    return off.mul_(32).round_().square_().sum(1, dtype=torch.float64).float()


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 (rows, ceil(K/2)) of codes (rows, K): even k in the low nibble, an unused nibble is 0."""
    rows, k = codes.shape
    even = torch.nn.functional.pad(codes, (0, k % 2)).contiguous().flatten()
    pairs = even.view(torch.int16)  # little-endian: even k is the low byte
    return ((pairs & 0xF) | ((pairs >> 4) & 0xF0)).to(torch.uint8).view(rows, -(-k // 2))


def unpack_nibbles(packed: Tensor, k: int, signed: bool) -> Tensor:
    """int8 (rows, k) of packed nibbles; signed ones are two's complement."""
    expected = (packed.shape[0], -(-k // 2))
    if packed.shape != expected:
        raise NunchakuError(f"codes: expected (rows, ceil({k}/2)) = {expected}, got {tuple(packed.shape)}")
    wide = packed.to(torch.int16, memory_format=torch.contiguous_format).flatten()
    codes = ((wide | (wide << 4)) & 0x0F0F).view(torch.int8).view(packed.shape[0], 2 * packed.shape[1])[:, :k]
    return (codes ^ 8) - 8 if signed else codes.contiguous()
