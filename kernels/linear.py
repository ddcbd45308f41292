"""The kernel of all linear ops: one of five ways to sum, the low-rank branch and the bias, one of five endings.

A tile is summed as (channels, rows), the weight first, and turned around for what follows. Rows and channels beyond the
matrix are read as its last ones, and not written.
"""
from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nunchaku_py.ops.quantize_act import empty_like_quantized
from nunchaku_py.ops.spec import ActSpec, LinearSpec

from . import epilogue, launch, linear_w4a4, linear_w4a8, linear_w4a16, quantize_act
from .config import Choices, Config, blocks, choose
from .gpu import gpu_of

TOGETHER = tl.constexpr(8)  # blocks of rows that pass along the channels together, so that caches serve both
ENDINGS = {"": "store", "_gate_residual": "gate", "_qkv_rope": "rope", "_gelu_quantize": "activate",
           "_glu_quantize": "glu"}
IN_TILE = ("int4", "uint4", "nvfp4")  # formats with scales that a tile knows alone


@triton.jit
def linear_kernel(
    qx, sx, qw, sw, aux, h, up, bias, first, second, third, out, out_scales, out_hidden,
    M, N, K, HALF_K, GROUPS, R, WIDTH, OUT_GROUPS, OUT_RANK, PERIOD, value, EVEN: tl.constexpr,
    SUM: tl.constexpr, WEIGHT: tl.constexpr, GROUP: tl.constexpr, UNSIGNED: tl.constexpr, ENDING: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, HEAD: tl.constexpr, NEXT: tl.constexpr,
    NEXT_GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):
    """WIDTH: columns of the result (of each of q, k and v); PERIOD: rows of a sample, or tokens of the rotary table;
    value: eps, or the next input's shift."""
    block, row_block = _place(M, N, BM, BN)
    rows = row_block * BM + tl.arange(0, BM)
    channels, columns = epilogue.channels_of(block, WIDTH, ENDING == "glu", GATE_FIRST, BN)
    row, channel = tl.minimum(rows, M - 1), tl.minimum(channels, N - 1)
    if SUM == "int8":
        acc = linear_w4a8.accumulate(qx, sx, qw, sw, row, channel, K, EVEN, BM, BN, BK)
    elif SUM == "expand":
        acc = linear_w4a8.accumulate_expanding(qx, sx, qw, sw, aux, row, channel, N, K, HALF_K, GROUPS, EVEN, WEIGHT,
                                               GROUP, BM, BN, BK)
    elif SUM == "int4":
        acc = linear_w4a4.accumulate_int4(qx, sx, qw, sw, row, channel, HALF_K, GROUPS, UNSIGNED, GROUP, BM, BN)
    elif SUM == "nvfp4":
        acc = linear_w4a4.accumulate_nvfp4(qx, sx, qw, sw, aux, row, channel, K, HALF_K, GROUPS, EVEN, BM, BN, BK)
    else:
        acc = linear_w4a16.accumulate(qx, qw, sw, aux, row, channel, K, HALF_K, GROUPS, EVEN, WEIGHT, GROUP, BM, BN,
                                      BK)
    acc = _low_rank(acc, h, up, row, channel, R, BR)
    y = tl.trans(acc + tl.load(bias + channel).to(tl.float32)[:, None])

    if ENDING == "store":
        epilogue.store(y, out, rows, columns, M, N)
    elif ENDING == "gate":
        epilogue.store(epilogue.gated(y, first, second, rows, columns, M, N, PERIOD), out, rows, columns, M, N)
    elif ENDING == "rope":
        y = epilogue.rotated(y, first, second, third, rows, columns, WIDTH, PERIOD, value, HEAD, BM, BN)
        epilogue.store_parts(y, out, rows, columns, M, WIDTH)
    else:
        _activated(y, first, second, out, out_scales, out_hidden, rows, block, M, WIDTH, OUT_GROUPS, OUT_RANK, value,
                   ENDING == "glu", ACTIVATION, up.dtype.element_ty, NEXT, NEXT_GROUP, BM, BN, BR)


@triton.jit
def _place(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """(block of channels, block of rows) of a program."""
    wide, tall = tl.cdiv(N, BN), tl.cdiv(M, BM)
    program = tl.program_id(0)
    above = program // (TOGETHER * wide) * TOGETHER
    height = tl.minimum(tall - above, TOGETHER)
    within = program % (TOGETHER * wide)
    return within // height, above + within % height


@triton.jit
def _low_rank(acc, h, up, row, channel, R, BR: tl.constexpr):
    """acc + up·hᵀ, h rounded to the type of up."""
    rank = tl.arange(0, BR)
    for start in range(0, R, BR):
        inside = start + rank < R
        a = tl.load(up + channel[:, None].to(tl.int64) * R + (start + rank)[None, :], mask=inside[None, :], other=0)
        b = tl.load(h + row[None, :].to(tl.int64) * R + (start + rank)[:, None], mask=inside[:, None], other=0)
        acc = tl.dot(a, b.to(a.dtype), acc)
    return acc


@triton.jit
def _activated(y, inv_smooth, down, out, out_scales, out_hidden, rows, block, M, WIDTH, GROUPS, R, shift,
               GLU: tl.constexpr, ACTIVATION: tl.constexpr, TYPE: tl.constexpr, NEXT: tl.constexpr,
               NEXT_GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The activated value, rounded to TYPE, as the next linear takes it; or as it is, where NEXT is "none"."""
    if GLU:
        value, gate = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        z = value * epilogue.activate(gate, ACTIVATION)
        W: tl.constexpr = BN // 2
    else:
        z = epilogue.activate(y, ACTIVATION)
        W: tl.constexpr = BN
    columns = block * W + tl.arange(0, W)
    if NEXT == "none":
        epilogue.store(z, out, rows, columns, M, WIDTH)
    else:
        z = tl.where((columns < WIDTH)[None, :], z, 0.0).to(TYPE)
        epilogue.quantized(z, inv_smooth, down, out, out_scales, out_hidden, rows, columns, block, M, WIDTH, GROUPS, R,
                           shift, NEXT, NEXT_GROUP, W, BR)


# ------------------------------------------------------------------------------------------------------------ launching
def linear(suffix: str, args: tuple, config: Config | None = None) -> Any:
    """The linear op with this ending, its arguments as ops/linear.py has them."""
    (qx, sx, qw, sw, aux, h, up, bias), extra, spec = _contiguous(args[:8]), _contiguous(args[8:-1]), args[-1]
    if _goes_through_int8(qx, spec, config):
        qw, sw, spec = *expand(qw, sw, aux, spec), with_int8(spec)
    ending = ENDINGS[suffix]
    call = Call(qx, sx, qw, sw, aux, h, up, bias, spec, ending, config)
    if ending in ("activate", "glu"):
        return call.quantized(*extra)
    if ending == "rope":
        return call.rotated(*extra)
    return call.gated(*extra) if extra else call.stored()


def _contiguous(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


class Call:
    """A product, ready for its ending."""

    def __init__(self, qx, sx, qw, sw, aux, h, up, bias, spec: LinearSpec, ending: str, config: Config | None) -> None:
        self.operands = (qx, _bits(sx), qw, _bits(sw), aux, h, up, bias)
        self.m, self.n, self.up, self.spec, self.ending = qx.shape[0], qw.shape[0], up, spec, ending
        self.sum = sum_of(spec)
        self.config = config or choose(choices_of(spec), problem_of(self.m, self.n, spec, ending), gpu_of(qx))

    def run(self, extra: tuple, out: tuple, width: int, groups: int = 0, rank: int = 0, period: int = 1,
            value: float = 0.0, next: ActSpec | None = None) -> None:
        spec, config, k = self.spec, self.config, self.spec.k
        nothing = self.up  # of what an ending neither reads nor writes
        extra, out = (*extra, *(nothing,) * (3 - len(extra))), (*out, *(nothing,) * (3 - len(out)))
        if not width:
            return
        launch.launch(
            linear_kernel, (blocks(self.m, config.m) * blocks(self.n, config.n),), *self.operands, *extra, *out,
            self.m, self.n, k, k // 2, groups_of(spec), self.up.shape[1], width, groups, rank, period, value,
            EVEN=k % config.k == 0, SUM=self.sum, WEIGHT=spec.weight, GROUP=spec.group,
            UNSIGNED=spec.act.format == "uint4", ENDING=self.ending, ACTIVATION=spec.activation,
            GATE_FIRST=spec.gate_first, HEAD=spec.head_dim, NEXT=next.format if next else "none",
            NEXT_GROUP=next.group if next else 0, BM=config.m, BN=config.n, BK=config.k,
            BR=32 if self.up.shape[1] % 32 == 0 else 16, warps=config.warps, stages=config.stages, **launch.EXACT)

    def stored(self) -> Tensor:
        y = self.up.new_empty(self.m, self.n)
        self.run((), (y,), self.n)
        return y

    def gated(self, gate: Tensor, residual: Tensor) -> Tensor:
        y = self.up.new_empty(self.m, self.n)
        self.run((gate, residual), (y,), self.n, period=max(1, self.m // gate.shape[0]))
        return y

    def rotated(self, q_norm: Tensor, k_norm: Tensor, rotary: Tensor) -> tuple[Tensor, ...]:
        width = self.n // 3
        parts = self.up.new_empty(3, self.m, width)
        self.run((q_norm.float(), k_norm.float(), rotary), (parts,), width, period=rotary.shape[0], value=self.spec.eps)
        return parts.unbind()

    def quantized(self, inv_smooth: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        next, width = self.spec.next, self.n // 2 if self.ending == "glu" else self.n
        if next.format not in IN_TILE:  # a scale for the whole row: nobody knows it before the row is there
            z = self.up.new_empty(self.m, width)
            self.run((), (z,), width)
            return quantize_act.quantize_act(z, inv_smooth, down, next)
        qx, sx, h = empty_like_quantized(self.up, self.m, width, down, next)
        parts = h.new_empty(blocks(self.n, self.config.n), *h.shape)
        self.run((inv_smooth, down), (qx, _bits(sx), parts), width, sx.shape[1], down.shape[0], value=next.shift,
                 next=next)
        return qx, sx, parts.sum(0)


def _bits(scales: Tensor) -> Tensor:
    """NVFP4's as the bytes that they are."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales


# ------------------------------------------------------------------------------------------------------- what is chosen
def sum_of(spec: LinearSpec) -> str:
    """Which of the five ways to sum."""
    act = spec.act.format
    if act == "int8":
        return "int8" if spec.weight == "int8" else "expand"
    return {"none": "decode", "nvfp4": "nvfp4"}.get(act, "int4")


def choices_of(spec: LinearSpec) -> Choices:
    return {"int8": linear_w4a8.CHOICES, "expand": linear_w4a8.EXPANDING, "int4": linear_w4a4.CHOICES,
            "nvfp4": linear_w4a4.NVFP4, "decode": linear_w4a16.CHOICES}[sum_of(spec)]


def problem_of(m: int, n: int, spec: LinearSpec, ending: str) -> tuple:
    """What configurations are chosen by."""
    fewest = spec.head_dim if ending == "rope" else 1
    if ending in ("activate", "glu") and spec.next.format in IN_TILE:
        fewest, ending = spec.next.group * (2 if ending == "glu" else 1), "quantize"
    return m, n, spec.k, spec.act.format, spec.weight, ending, fewest


def groups_of(spec: LinearSpec) -> int:
    return -(-spec.k // spec.group) if spec.group else 1


# -------------------------------------------------------------------------------------------------- INT8 for many rows
def _goes_through_int8(qx: Tensor, spec: LinearSpec, config: Config | None) -> bool:
    return sum_of(spec) == "expand" and config is None and qx.shape[0] > linear_w4a8.FEW_ROWS


@cache  # a new spec costs as much as all else before a launch
def with_int8(spec: LinearSpec) -> LinearSpec:
    return replace(spec, weight="int8", group=0, row_scales=False)


def expand(qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """(w8 (N,K), s_ch (N)) of a 4-bit weight whose s_ch stands in aux."""
    n, k, rows, inputs = qw.shape[0], spec.k, 64, 128
    w8 = qw.new_empty(n, k, dtype=torch.int8)
    launch.launch(linear_w4a8.expand_kernel, (blocks(n, rows), blocks(k, inputs)), qw, _bits(sw), aux, w8, n, k,
                  k // 2, groups_of(spec), EVEN=k % inputs == 0, WEIGHT=spec.weight, GROUP=spec.group, BN=rows,
                  BK=inputs, warps=4, **launch.EXACT)
    return w8, aux[:n]
