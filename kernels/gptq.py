"""GPTQ's column loop: rounds up to COLUMNS columns one after the other, each taking up the errors of those before.

    c_j ← c_j − Σ_{i<j} U_ij·e_i (i ascending);   q = step·round(c_j·inverse);   e_j = (c_j − q)/U_jj;   c_j ← q

Rows of the weight are independent: a block holds all columns of BN of them in registers, and reads U a row at a time,
which every block reads and the cache keeps.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nunchaku_py.formats import Format

from . import launch
from .config import blocks

COLUMNS = 128
WARPS = 1  # what is summed over columns never leaves a warp
ROWS, ODD_ROWS = 16, 8  # a block's: of twice as many, registers are spilled; of odd sizes, which hold more addresses
WHOLE = tl.constexpr(12582912.0)  # 1.5·2^23: adding and taking it away rounds half to even
STEPS = tl.constexpr(6291456.0)  # 0.75·2^23: half a step of 1
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def nearest(v, FORMAT: tl.constexpr):
    """v at the nearest value of a code, ties to the even one."""
    if FORMAT == "nvfp4":
        v = tl.minimum(tl.maximum(v, -6.0), 6.0)
        power = (v.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
        magic = tl.maximum(power, 1.0) * STEPS
        return (v + magic) - magic
    else:
        v = tl.minimum(tl.maximum(v, -7.0), 7.0)
        return (v + WHOLE) - WHOLE


@triton.jit
def gptq_kernel(
    columns, errors, upper, step, inverse, group, n, k, stride, error_stride, FORMAT: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ks, there = tl.arange(0, BK), rows < n
    at, inside = ks[:, None] * stride + rows[None, :], (ks[:, None] < k) & there[None, :]  # 32 bits: half the registers
    tile = tl.load(columns + at, mask=inside, other=0.0)
    for j in range(k):
        c = tl.sum(tl.where(ks[:, None] == j, tile, 0.0), 0)
        place = tl.load(group + j) * n + rows
        by = tl.load(step + place, mask=there, other=0.0)
        q = nearest(c * tl.load(inverse + place, mask=there, other=0.0), FORMAT) * by
        diagonal = tl.load(upper + j * k + j)
        e = tl.math.div_rn(c - q, tl.broadcast_to(diagonal, q.shape))
        tl.store(errors + j * error_stride + rows, e, mask=there)
        u = tl.load(upper + j * k + ks, mask=(ks > j) & (ks < k), other=0.0)
        tile = tl.fma(tl.broadcast_to(-u[:, None], tile.shape), tl.broadcast_to(e[None, :], tile.shape), tile)
        tile = tl.where(ks[:, None] == j, tl.broadcast_to(q[None, :], tile.shape), tile)
    tl.store(columns + at, tile, mask=inside)


def sweep(columns: Tensor, errors: Tensor, upper: Tensor, step: Tensor, inverse: Tensor, group: Tensor, fmt: Format
          ) -> None:
    """columns, errors (k,N), rows whole; upper (k,k), step and inverse (G,N), group int64 (k) contiguous."""
    k, n = columns.shape
    even = all(size % 16 == 0 for size in (n, columns.stride(0), errors.stride(0)))
    bn = ROWS if even else ODD_ROWS
    launch.launch(
        gptq_kernel, (blocks(n, bn),), columns, errors, upper, step, inverse, group, n, k, columns.stride(0),
        errors.stride(0), warps=WARPS, FORMAT=fmt.name, BK=COLUMNS, BN=bn, **launch.EXACT)
