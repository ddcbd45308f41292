"""What the arithmetic of the CPU ops allows: exact values in float64, and how far fp32 may end up from them.

A sum of fp32 numbers in which a term goes through t roundings is off by at most t·U·Σ|terms|, and terms of U², whatever
the order; fused multiply-adds only round less. The result is rounded once more, to its own type: rounding is monotone,
so it lies between the rounded ends of the interval.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nunchaku_py import native
from nunchaku_py.formats import mul_groups_
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.ops.linear_w4a8 import int8_matmul
from nunchaku_py.ops.quantize_act import unpack
from tests.backends.cpu_cases import Case, decoded, fold

U = 2.0**-24  # one rounding to fp32
MORE = 1.001  # the terms of U² and above
TINY = 2.0**-126  # the smallest normal fp32
LARGEST = 2.0**126  # what is larger may overflow on its way
TILES = ("amx", "amx_emulated")  # multiply bf16 only
# The tail e^-88 at which the exponential stops, and the slopes that GELU and SiLU do not exceed.
TAIL, SLOPE = 2.0**-125, 1.13


@dataclass
class Bounded:
    """Exact values in float64, the most that fp32 may be off, and the sum of the sizes of what was added up."""

    exact: Tensor
    slack: Tensor
    size: Tensor

    def columns(self, part: slice) -> Bounded:
        return Bounded(self.exact[:, part], self.slack[:, part], self.size[:, part])


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal numbers, NaN where NaN is wanted."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    a, b = got.double(), want.double()
    assert ((a == b) | (a.isnan() & b.isnan())).all(), f"{(a != b).sum()} differ, by up to {(a - b).abs().max()}"


def assert_rounded_once(got: Tensor, bounded: Bounded) -> None:
    """Between the ends; where the exact value is no number, none; where fp32 may overflow, anything."""
    exact, slack = bounded.exact, bounded.slack
    assert got.shape == exact.shape
    low, high = (exact - slack).to(got.dtype), (exact + slack).to(got.dtype)
    inside = (low <= got) & (got <= high)
    right = torch.where(exact.isfinite(), inside | ~(bounded.size <= LARGEST), ~got.isfinite())
    off = (got.double() - exact).abs() / slack
    assert right.all(), f"{(~right).sum()} of {right.numel()} outside, off by {off[~right].max()} times what is allowed"


def flushed(x: Tensor, y: Tensor) -> Tensor:
    """What x·yᵀ may lose where products of bf16 treat subnormal numbers as zero, operands and sums."""
    if native.module.cpu_isa() not in ("avx512_bf16", *TILES) or x.dtype != torch.bfloat16:
        return torch.tensor(x.shape[1] * 2.0**-149)
    a, b = x.double().abs(), y.double().abs()
    subnormal_a, subnormal_b = a * (a < TINY), b * (b < TINY)
    return subnormal_a @ b.T + a @ subnormal_b.T + x.shape[1] * TINY


def product(x: Tensor, y: Tensor) -> Bounded:
    """x·yᵀ: K products, each rounded, and added to the sum; three roundings to bring partial sums together."""
    a, b = x.double(), y.double()
    size = a.abs() @ b.abs().T
    return Bounded(a @ b.T, (x.shape[1] + 4) * U * MORE * size + flushed(x, y), size)


# ------------------------------------------------------------------------------------------------------------- the sums
def linear(qx, sx, qw, sw, aux, h, up, bias, spec: LinearSpec) -> Bounded:
    """y before its epilogue."""
    if spec.row_scales:
        aux = aux[qw.shape[0]:]
    accumulate = {"none": sums_w4a16, "int8": sums_w4a8}.get(spec.act.format, sums_w4a4)
    acc = accumulate(qx, sx, qw, sw, aux, spec)
    if not up.shape[1] and not acc.slack.any():
        whole = acc.exact.float() + bias.float()
        return Bounded(whole.double(), torch.zeros_like(acc.slack), acc.size + bias.double().abs())
    branch = low_rank(h, up)
    size = acc.size + branch.size + bias.double().abs()
    # Each term passes through the additions that follow: the branch's, and that of the bias.
    slack = acc.slack + branch.slack + (up.shape[1] + 2) * U * MORE * size
    return Bounded(acc.exact + branch.exact + bias.double(), slack, size)


def low_rank(h: Tensor, up: Tensor) -> Bounded:
    """h·upᵀ. In tiles h is two bf16, each off by at most 2^-9: 2^-18 of h is lost, and terms are twice as many."""
    fine = product(h, up.float())
    if native.module.cpu_isa() not in TILES or up.dtype != torch.bfloat16:
        return fine
    lost = flushed(h.to(up.dtype), up) + 2 * TINY * (up.double().abs().sum(1) + up.shape[1])
    return Bounded(fine.exact, 2 * MORE * fine.slack + 2.0**-18 * MORE * fine.size + lost, fine.size)


def sums_w4a8(qx, sx, qw, sw, aux, spec: LinearSpec) -> Bounded:
    """(s32·sx)·s_ch, bit for bit."""
    w8, s_ch = fold(qw, sw, aux, spec)
    acc = int8_matmul(qx, w8).float() * sx[:, None] * s_ch
    return Bounded(acc.double(), torch.zeros(acc.shape, dtype=torch.float64), acc.double().abs())


def sums_w4a16(qx, sx, qw, sw, aux, spec: LinearSpec) -> Bounded:
    return product(qx, decoded(qw, sw, aux, spec).to(qx.dtype))


def sums_w4a4(qx, sx, qw, sw, aux, spec: LinearSpec) -> Bounded:
    """Groups of exact integers: three roundings with the scales, one for each group's addition, one for channel_scale;
    with zeros twice that. Integer and weight's scale come first, and may be subnormal before the other scales.
    """
    groups, zeros, channel = sw.shape[1], spec.weight == "uint4", spec.weight == "nvfp4"
    x, small = values(qx, sx, spec.k, spec.act), values(qx, torch.full_like(sx, 1), spec.k, spec.act)
    w = values(qw, sw, spec.k, spec)
    parts = x.abs() @ w.abs().T
    if zeros:
        wide = mul_groups_(torch.ones_like(w), aux.double(), spec.group)
        parts, w = parts + x.abs() @ wide.abs().T, w + wide
    lost = x.abs().sum(1, keepdim=True) * 16 * TINY * U + (small.abs() @ w.abs().T) * TINY * U + groups * TINY * U
    scale = aux.double() if channel else torch.ones((), dtype=torch.float64)
    rounds = (2 if zeros else 1) * (groups + 3) + 1
    size = parts * scale.abs()
    # What is on its way to a small result may be too large: integer times scale, before the token's own; Σx for zeros.
    on_its_way = size + parts + small.abs() @ w.abs().T + x.abs().sum(1, keepdim=True)
    return Bounded((x @ w.T) * scale, rounds * U * MORE * size + lost * (1 + scale.abs()), on_its_way)


def values(q: Tensor, scales: Tensor, k: int, spec: ActSpec | LinearSpec) -> Tensor:
    """code·scale in float64, where every product of both is exact."""
    fmt = spec.fmt
    codes, scales = unpack(q, scales, k, fmt)
    table = torch.arange(16).double() if fmt.name != "nvfp4" else torch.tensor(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
    plain = codes.double() if fmt.name == "int4" else table[codes.long()]
    return mul_groups_(plain, scales.double(), fmt.group)


# ------------------------------------------------------------------------------------------------- endings and the norm
def activate(y: Bounded, name: str) -> Bounded:
    """activation(y): the error of y through the slope, and the function's own."""
    x = y.exact
    u = 1.5957691216057308 * (x + 0.044715 * x**3)
    exact, error = {
        "none": lambda: (x, 0 * x),
        # exp: 2^-22; one addition, one division.
        "silu": lambda: (x * torch.sigmoid(x), 6 * U * (x * torch.sigmoid(x)).abs() + TAIL * x.abs()),
        # The argument u of the exponential has eight roundings, which it turns into |u| times their size.
        "gelu_tanh": lambda: (x * torch.sigmoid(u), (8 * u.abs().clamp(max=88) + 6) * U * (x * torch.sigmoid(u)).abs()
                              + TAIL * x.abs()),
        # ½|x|·erfc with Abramowitz and Stegun's 1.5e-7; the polynomial's coefficients add up to 4.4, each with its
        # roundings (ten) and those of t (three, five times).
        "gelu": lambda: (0.5 * x * torch.erfc(-x * 0.5**0.5),
                         0.5 * x.abs() * (1.5e-7 + 4.4 * 25 * U) + 2 * U * x.abs()),
    }[name]()
    exact = torch.where(x.isfinite(), exact, x)
    slope = 1.0 if name == "none" else SLOPE
    return Bounded(exact, slope * y.slack + error.nan_to_num(0, 0, 0) * MORE, y.size)


def glu(y: Bounded, case: Case) -> Bounded:
    """value·activation(gate)"""
    half = y.exact.shape[1] // 2
    value, gate = y.columns(slice(0, half)), y.columns(slice(half, None))
    if case.gate_first:
        value, gate = gate, value
    gate = activate(gate, case.activation)
    exact = value.exact * gate.exact
    slack = value.exact.abs() * gate.slack + gate.exact.abs() * value.slack + value.slack * gate.slack
    finite = value.exact.isfinite() & gate.exact.isfinite()
    exact = torch.where(finite, exact, torch.nan)
    return Bounded(exact, slack + 2 * U * exact.abs() + TINY * U, value.size * gate.size + value.size + gate.size)


def gate_residual(y: Bounded, gate: Tensor, residual: Tensor) -> Bounded:
    rows = torch.arange(y.exact.shape[0]) // max(y.exact.shape[0] // gate.shape[0], 1)
    g, r = gate.double()[rows], residual.double()
    size = y.size * g.abs() + r.abs()
    exact = r + g * y.exact
    return Bounded(exact, g.abs() * y.slack + 2 * U * MORE * size + TINY * U, torch.maximum(size, y.size))


def modulated(x, norm_weight, scale, shift, spec: ActSpec) -> Bounded:
    """norm(x)·norm_weight·(1 + scale) + shift.

    Sums are taken in fp32 over sixteen vectors of up to sixteen lanes (16 + 4 roundings), then in float64; the mean is
    rounded to fp32, and what it is off by (d) comes back in the variance as d².
    """
    x = x.double()
    rows = torch.arange(len(x)) // max(len(x) // len(scale), 1)
    gain = norm_weight.double() * (1 + scale.double()[rows])
    mean = x.mean(1, keepdim=True) if spec.norm == "layer" else torch.zeros(len(x), 1).double()
    d = (22 * U * x.abs().mean(1, keepdim=True) if spec.norm == "layer" else mean) + TINY * U
    centred = x - mean
    variance = centred.square().mean(1, keepdim=True)
    inverse = (variance + spec.eps).rsqrt()
    relative = (d * d + 2 * d * centred.abs().mean(1, keepdim=True) * U
                + 24 * U * (variance + d * d)) / (variance + spec.eps) / 2
    relative = relative / (1 - relative.clamp(max=0.5)) + 2 * U
    product = centred * inverse * gain
    off = (centred.abs() * (relative + 6 * U) + d * (1 + relative)) * inverse * gain.abs()
    other = shift.double()[rows]
    return Bounded(product + other, off * MORE + 2 * U * (product.abs() + other.abs()) + TINY,
                   x.square().sum(1, keepdim=True) + product.abs() + other.abs())
