"""What follows a product: the arguments of its kernel, and the results when that has run."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ... import native
from ...ops.quantize_act import empty_like_quantized
from .device import aligned, where
from .numbers import CODES
from .operands import Linear

ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}
NEXT_RANKS = 8  # the kernels multiply by so many ranks of the next linear's down at a time
Ended = tuple[object, Callable[[], object]]
Ending = Callable[[list[Linear]], list[Ended]]


def stored(linears: list[Linear]) -> list[Ended]:
    def one(linear: Linear) -> Ended:
        y = linear.up.new_empty(linear.m, linear.n)
        return native.module.cuda.StoreArguments(y.data_ptr()), lambda: y

    return list(map(one, linears))


def gated(linears: list[Linear]) -> list[Ended]:
    def one(linear: Linear) -> Ended:
        linear.expect_more("_gate_residual")
        gate, residual = linear.extra
        gate, residual = linear.keep(aligned(gate, linear.up.dtype), aligned(residual))
        y = linear.up.new_empty(linear.m, linear.n)
        return native.module.cuda.GateResidualArguments(
            gate.data_ptr(), residual.data_ptr(), gate.shape[0], y.data_ptr()), lambda: y

    return list(map(one, linears))


def rotated(linears: list[Linear]) -> list[Ended]:
    def one(linear: Linear) -> Ended:
        linear.expect_more("_qkv_rope")
        q_norm, k_norm, rotary = linear.keep(*(aligned(tensor, torch.float32) for tensor in linear.extra))
        out = tuple(linear.up.new_empty(linear.m, linear.n // 3) for _ in range(3))
        return native.module.cuda.QkvRopeArguments(
            q_norm.data_ptr(), k_norm.data_ptr(), rotary.data_ptr(), linear.spec.head_dim, rotary.shape[0],
            linear.spec.eps, *(tensor.data_ptr() for tensor in out)), lambda: out

    return list(map(one, linears))


def quantized(suffix: str, columns: int) -> Ending:
    """Of endings that quantize for the next linear, one column for so many of y."""
    def ending(linears: list[Linear]) -> list[Ended]:
        if linears[0].spec.next.format == "int8":
            return [_activated(linear, suffix, linear.n // columns) for linear in linears]
        kernels = native.module.cuda
        count = kernels.gelu_parts if suffix == "_gelu_quantize" else kernels.glu_parts
        counts = count(where(linears[0].qx)[0], [(linear.m, linear.n) for linear in linears])
        return [_in_parts(linear, suffix, linear.n // columns, parts)
                for linear, parts in zip(linears, counts, strict=True)]

    return ending


def _in_parts(linear: Linear, suffix: str, width: int, parts: int) -> Ended:
    """The kernel quantizes, and leaves h in parts."""
    linear.expect_more(suffix)
    inv_smooth, down = linear.extra
    ranks = down.shape[0]
    missing = -ranks % NEXT_RANKS
    out = empty_like_quantized(linear.up, linear.m, width, down, linear.spec.next)
    padded = F.pad(down, (0, 0, 0, missing)) if missing else down
    inv_smooth, padded, part = linear.keep(
        aligned(inv_smooth), aligned(padded), out[2].new_empty(parts, linear.m, padded.shape[0]))
    h = out[2].new_empty(part.shape[1:]) if missing else out[2]
    arguments = _next_arguments(linear, inv_smooth, padded, out[0], out[1], h)
    arguments.set_parts(part.data_ptr())
    return arguments, lambda: (out[0], out[1], h[:, :ranks].contiguous())


def _activated(linear: Linear, suffix: str, width: int) -> Ended:
    """The kernel leaves z, which another quantizes."""
    linear.expect_more(suffix)
    inv_smooth, down = linear.extra
    out = empty_like_quantized(linear.up, linear.m, width, down, linear.spec.next)
    inv_smooth, down, z, tops = linear.keep(
        aligned(inv_smooth), aligned(down), linear.up.new_empty(linear.m, width), linear.h.new_zeros(linear.m))
    arguments = _next_arguments(linear, inv_smooth, down, *out)
    arguments.set_activated(z.data_ptr(), tops.data_ptr())
    return arguments, lambda: out


def _next_arguments(linear: Linear, inv_smooth, down, qx, sx, h):
    spec = linear.spec.next
    return native.module.cuda.NextArguments(
        ACTIVATIONS[linear.spec.activation], linear.spec.gate_first, CODES[spec.format], spec.shift,
        inv_smooth.data_ptr(), down.data_ptr(), down.shape[0], qx.data_ptr(), sx.data_ptr(), h.data_ptr())
