"""linear_w4a16 by the CUDA kernels, which read everything in rows."""
from __future__ import annotations

from torch import Tensor

from ... import native, ops
from ...ops.spec import ROW, LinearSpec
from .device import OLDEST, TYPES, aligned, refuses_device, refuses_dtype, where
from .linears import other_scales
from .operands import whole_ranks

WARP = 32


def _refuses(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, *args: Tensor | LinearSpec) -> str | None:
    spec, up = args[-1], args[2]
    refused = refuses_device(qx) or refuses_dtype(up.dtype, qx.device, OLDEST)  # or without tensor cores
    if refused:
        return refused
    if spec.weight not in ("int4", "uint4") or spec.group % WARP or spec.k % WARP:
        return (f"it takes INT4 weights, and inputs and groups in multiples of {WARP}, not {spec.weight}, {spec.k} and "
                f"{spec.group}")
    return None if sw.dtype == up.dtype else other_scales(sw, up)


@ops.linear_w4a16.backend("cuda", _refuses, (ROW,))
def linear_w4a16(qx, sx, qw, sw, aux, h, up, bias, spec):
    y = up.new_empty(qx.shape[0], qw.shape[0])
    if not y.numel():
        return y
    h, up = whole_ranks(h, up)
    x, qw, sw, h, up = map(aligned, (qx, qw, sw, h, up))
    zeros, bias = aligned(aux, up.dtype), aligned(bias, h.dtype)
    kernels = native.module.cuda
    kernels.linear_w4a16(kernels.DecodedArguments(
        *where(x), TYPES[x.dtype], *y.shape, spec.k, up.shape[1], spec.group, x.data_ptr(), qw.data_ptr(),
        sw.data_ptr(), zeros.data_ptr() if spec.weight == "uint4" else 0, h.data_ptr(), up.data_ptr(), bias.data_ptr(),
        y.data_ptr()))
    return y
