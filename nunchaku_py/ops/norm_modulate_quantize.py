"""norm_modulate_quantize: what stands between a residual stream and a quantized linear, in one read of x."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, expect, expect_matrix, expect_that
from .quantize_act import empty_like_quantized, quantizer_tensors
from .quantize_act import quantize_act as _quantize_act
from .registry import Op
from .spec import ActSpec


def norm_modulate_quantize(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_act of norm(x)·norm_weight·(1 + scale) + shift.

    x (M,K), norm_weight (K), scale and shift (B,K): rows b·M/B … belong to sample b. norm is LayerNorm or RMSNorm over
    K with spec.eps, by spec.norm. All in fp32; the modulated value is rounded once to x's dtype, and both x̂ and h are
    computed from that.
    """
    m, k = x.shape
    normed = (_normalize(x.float(), spec) * norm_weight.float()).view(scale.shape[0], m // scale.shape[0], k)
    modulated = normed * (1 + scale.float()).unsqueeze(1) + shift.float().unsqueeze(1)
    return _quantize_act.reference(modulated.view(m, k).to(x.dtype), inv_smooth, down, spec)


def _normalize(x: Tensor, spec: ActSpec) -> Tensor:
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[1:], eps=spec.eps)
    return rms_norm(x, spec.eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _check(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> None:
    expect_matrix("x", "(rows, in)", x)
    expect_matrix("scale", "(samples, in)", scale)
    (m, k), samples = x.shape, scale.shape[0]
    expect_that(spec.norm != "none", "norm_modulate_quantize: spec.norm is 'none', expected 'layer' or 'rms'")
    expect_that(samples > 0 and m % samples == 0, f"scale: expected samples that divide the {m} rows, got {samples}")
    expect(x, (
        ("x", x, "(rows, in)", (m, k), FLOATS),
        ("norm_weight", norm_weight, "(in)", (k,), FLOATS),
        ("scale", scale, "(samples, in)", (samples, k), FLOATS),
        ("shift", shift, "(samples, in)", (samples, k), FLOATS),
        *quantizer_tensors(k, inv_smooth, down, x.dtype),
    ))


def _fake(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)


norm_modulate_quantize = Op(norm_modulate_quantize, _fake, _check)
