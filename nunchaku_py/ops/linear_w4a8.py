"""linear_w4a8: 4-bit weights, as int8 with one scale per output channel, times int8 activations."""
from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..formats import fold_int8
from .linear import family, zeros_and_channel_scale
from .quantize_act import unpack
from .spec import LinearSpec

EXACT = 1024  # the longest sum of int8 products that fp32 holds exactly: 127·127·1024 < 2^24


def _accumulate(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> Tensor:
    """acc[m,n] = (Σ_k qx[m,k]·w8[n,k])·sx[m]·s_ch[n], the sum exact in s32; y as in linear.py.

    w8, s_ch = fold_int8(qw, sw), s_ch from aux if it is there; or qw, sw themselves when spec.weight is "int8".
    """
    w8, s_ch = (qw, sw) if spec.weight == "int8" else _fold(qw, sw, aux, spec)
    return int8_matmul(qx, w8).float().mul_(sx.unsqueeze(1)).mul_(s_ch)


def _fold(qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    s_ch, aux = (aux[:qw.shape[0]], aux[qw.shape[0]:]) if spec.row_scales else (None, aux)
    return fold_int8(*unpack(qw, sw, spec.k, spec.fmt), spec.fmt, *zeros_and_channel_scale(aux, spec), s_ch)


@cache
def _int8_instructions() -> bool:
    """Whether int8 products are summed in 32 bits: without VNNI, oneDNN may sum pairs in 16 bits, which saturate."""
    return torch.cpu._is_vnni_supported()


def int8_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x (M,K) int8 · wᵀ, w (N,K) int8, exactly: int32 (M,N)."""
    if x.device.type == "cpu" and x.numel() and w.numel() and x.shape[1] > 1 and _int8_instructions():
        return torch._int_mm(x.contiguous(), w.contiguous().T)  # which is wrong for K = 1
    y = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT):
        part = slice(start, start + EXACT)
        y += (x[:, part].float() @ w[:, part].float().T).to(torch.int32)
    return y


(
    linear_w4a8,
    linear_w4a8_gelu_quantize,
    linear_w4a8_glu_quantize,
    linear_w4a8_qkv_rope,
    linear_w4a8_gate_residual,
) = family(_accumulate, acts=("int8",), weights=("int4", "uint4", "nvfp4", "int8"))
