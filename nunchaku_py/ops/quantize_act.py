"""quantize_act: the input of a quantized linear, and the low-rank branch's share of reading it."""
from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, group_count, pack_nibbles, quantize_rows, unpack_nibbles
from .checks import FLOATS, Expected, expect, expect_matrix, expect_that
from .registry import Op
from .spec import MMA, ActSpec, mma_scales


def quantize_act(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    """qx, sx = Q(x̂) with x̂ = (x + shift)·inv_smooth in fp32;  h = x·downᵀ in fp32, from the raw x.

    x (M,K), inv_smooth (K) fp32 = 1/smooth, down (R,K) as x → by spec.format:
        int4, uint4, nvfp4   qx uint8 (M,ceil(K/2)), sx (M,G) as x; nvfp4: float8_e4m3fn
        int8                 qx int8 (M,K), sx (M) fp32
        none                 qx = x̂ (M,K) as x, sx (0) fp32
    and h (M,R) fp32. A NaN or an infinity in x makes the scale of its group NaN, and with it that row of y.
    """
    wide = x.float()
    h = wide @ down.float().T
    return *pack((wide + spec.shift).mul_(inv_smooth), x.dtype, spec), h


def pack(xhat: Tensor, dtype: torch.dtype, spec: ActSpec) -> tuple[Tensor, Tensor]:
    """(qx, sx) in row layout of x̂ (M,K) fp32."""
    if spec.fmt is None:
        return xhat.to(dtype, copy=True, memory_format=torch.contiguous_format), xhat.new_empty(0)
    codes, scales = quantize_rows(xhat, spec.fmt, dtype)
    return (pack_nibbles(codes), scales) if spec.fmt.packed else (codes, scales[:, 0])


def unpack(q: Tensor, scales: Tensor, k: int, fmt: Format) -> tuple[Tensor, Tensor]:
    """(codes int8 (rows,k), scales (rows,G)) of a matrix in row layout."""
    if not fmt.packed:
        return q, scales.unsqueeze(1)
    return unpack_nibbles(q, k, signed=fmt.name == "int4"), scales


def empty_like_quantized(like: Tensor, m: int, k: int, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and device of what quantizing an (m,k) activation of `like`'s dtype gives."""
    h = like.new_empty((m, down.shape[0]), dtype=torch.float32)
    if spec.fmt is None:
        return like.new_empty((m, k)), like.new_empty(0, dtype=torch.float32), h
    if not spec.fmt.packed:
        return like.new_empty((m, k), dtype=torch.int8), like.new_empty(m, dtype=torch.float32), h
    shape = mma_scales(spec.format, m, k) if spec.layout == MMA else (m, group_count(k, spec.group))
    scales = like.new_empty(shape, dtype=spec.fmt.scale_dtype(like.dtype))
    return like.new_empty((m, -(-k // 2)), dtype=torch.uint8), scales, h


def quantizer_tensors(
    k: int, inv_smooth: Tensor, down: Tensor, dtype: torch.dtype, prefix: str = ""
) -> tuple[Expected, ...]:
    """What quantizing an activation with k columns asks of its operands."""
    return (
        (f"{prefix}inv_smooth", inv_smooth, "(in)", (k,), (torch.float32,)),
        (f"{prefix}down", down, "(rank, in)", (down.shape[0], k), (dtype,)),
    )


def _check(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> None:
    expect_matrix("x", "(rows, in)", x)
    expect_that(spec.norm == "none", f"quantize_act: spec.norm is {spec.norm!r}, which norm_modulate_quantize applies")
    expect(x, (("x", x, "(rows, in)", x.shape, FLOATS), *quantizer_tensors(x.shape[1], inv_smooth, down, x.dtype)))


def _fake(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)


quantize_act = Op(quantize_act, _fake, _check)
