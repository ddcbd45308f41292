"""quantize_act and norm_modulate_quantize by the CUDA kernels."""
from __future__ import annotations

from torch import Tensor

from ... import native, ops
from ...ops.quantize_act import empty_like_quantized
from ...ops.spec import MMA, ROW, ActSpec
from .device import TYPES, aligned, refuses_device, refuses_dtype, where
from .numbers import CODES, refuses_act

NORMS = {"layer": 1, "rms": 2}


def _refuses(x: Tensor, *args: Tensor | ActSpec) -> str | None:
    spec = args[-1]
    refused = refuses_device(x) or refuses_dtype(x.dtype, x.device) or refuses_act(spec, x.shape[1], x.device)
    wanted = ROW if spec.format == "int8" else MMA
    return refused or (None if spec.layout == wanted else f"it leaves {spec.format} laid out as '{wanted}'")


def _quantizer(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec, out: tuple[Tensor, Tensor, Tensor]):
    qx, sx, h = out
    return native.module.cuda.QuantizeArguments(
        *where(x), TYPES[x.dtype], x.shape[0], x.shape[1], down.shape[0], x.data_ptr(), inv_smooth.data_ptr(),
        down.data_ptr(), CODES[spec.format], spec.shift, qx.data_ptr(), sx.data_ptr(), h.data_ptr())


@ops.quantize_act.backend("cuda", _refuses, (MMA, ROW))
def quantize_act(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    x, inv_smooth, down = map(aligned, (x, inv_smooth, down))
    out = empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)
    if x.shape[0]:
        native.module.cuda.quantize_act(_quantizer(x, inv_smooth, down, spec, out))
    return out


@ops.norm_modulate_quantize.backend("cuda", _refuses, (MMA, ROW))
def norm_modulate_quantize(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> tuple[Tensor, Tensor, Tensor]:
    x, inv_smooth, down = map(aligned, (x, inv_smooth, down))
    norm_weight, scale, shift = (aligned(tensor, x.dtype) for tensor in (norm_weight, scale, shift))
    out = empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)
    if x.shape[0]:
        call = _quantizer(x, inv_smooth, down, spec, out)
        call.set_norm(NORMS[spec.norm], spec.eps, norm_weight.data_ptr(), scale.data_ptr(), shift.data_ptr(),
                      scale.shape[0])
        native.module.cuda.norm_modulate_quantize(call)
    return out
