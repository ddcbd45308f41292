"""linear_w4a4: 4-bit weights times 4-bit activations."""
from __future__ import annotations

import torch
from torch import Tensor

from ..formats import decode
from .linear import family, multiply_decoded
from .quantize_act import unpack
from .spec import LinearSpec


def _accumulate(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> Tensor:
    """acc[m,n] = Σ_g sx[m,g]·sw[n,g]·(Σ_{k in g} qx[m,k]·qw[n,k]) in fp32, ·channel_scale[n]; y as in
    linear.py.

    The reference multiplies the dequantized matrices in fp32: the same sum but for the order of its fp32 roundings.
    """
    x = decode(*unpack(qx, sx, spec.k, spec.act.fmt), spec.act.fmt)
    return multiply_decoded(x, qw, sw, aux, spec, torch.float32)


(
    linear_w4a4,
    linear_w4a4_gelu_quantize,
    linear_w4a4_glu_quantize,
    linear_w4a4_qkv_rope,
    linear_w4a4_gate_residual,
) = family(_accumulate, acts=("int4", "uint4", "nvfp4"), weights=("int4", "uint4", "nvfp4"))
