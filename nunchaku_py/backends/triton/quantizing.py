"""quantize_act and norm_modulate_quantize by Triton kernels."""
from __future__ import annotations

from torch import Tensor

from ... import ops
from ...ops.spec import ActSpec
from .device import kernels, refuses_device, refuses_dtype, refuses_gradient

GROUPS = (16, 32, 64, 128)


def refuses_act(spec: ActSpec) -> str | None:
    """Why an activation is not quantized like this."""
    if spec.format in ("int8", "none") or spec.group in GROUPS:
        return None
    return f"it quantizes in groups of {', '.join(map(str, GROUPS))}, not {spec.group}"


def _refuses(x: Tensor, *args: Tensor | ActSpec) -> str | None:
    return refuses_device(x) or refuses_dtype(x.dtype) or refuses_act(args[-1]) or refuses_gradient(x)


@ops.quantize_act.backend("triton", _refuses)
def quantize_act(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("quantize_act").quantize_act(x, inv_smooth, down, spec)


@ops.norm_modulate_quantize.backend("triton", _refuses)
def norm_modulate_quantize(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> tuple[Tensor, Tensor, Tensor]:
    call = kernels("norm_modulate_quantize").norm_modulate_quantize
    return call(x, norm_weight, scale, shift, inv_smooth, down, spec)
