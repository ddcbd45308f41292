"""linear_w4a16: 4-bit weights decoded to 16 bit, times 16-bit activations."""
from __future__ import annotations

from torch import Tensor

from .linear import family, multiply_decoded
from .spec import LinearSpec


def _accumulate(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> Tensor:
    """acc[m,n] = Σ_k qx[m,k]·w[n,k] in fp32; qx = x̂ and w = decode(qw, sw) in the dtype of x; y as in linear.py."""
    return multiply_decoded(qx.float(), qw, sw, aux, spec, qx.dtype)


(
    linear_w4a16,
    linear_w4a16_gelu_quantize,
    linear_w4a16_glu_quantize,
    linear_w4a16_qkv_rope,
    linear_w4a16_gate_residual,
) = family(_accumulate, acts=("none",), weights=("int4", "uint4", "nvfp4", "int8"))
