"""What may follow a quantized linear before its result reaches memory. y (M,N) is fp32, results are rounded once."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, Expected, expect_matrix, expect_that
from .norm_modulate_quantize import rms_norm
from .quantize_act import empty_like_quantized, quantize_act, quantizer_tensors
from .spec import LinearSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Epilogue:
    """One ending: what it computes, the shapes of that, and what it expects of its own operands.

    apply(y, dtype, *extra, spec), fake(up, m, n, *extra, spec), check(up, m, n, *extra, spec).
    """

    suffix: str
    parameters: tuple[str, ...]
    outputs: int
    apply: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., Iterable[Expected]]
    doc: str


def _store(y: Tensor, dtype: torch.dtype, spec: LinearSpec) -> Tensor:
    return y.to(dtype)


def _fake_store(up: Tensor, m: int, n: int, spec: LinearSpec) -> Tensor:
    return up.new_empty((m, n))


def _nothing_more(up: Tensor, m: int, n: int, spec: LinearSpec) -> Iterable[Expected]:
    return ()


def _gelu_quantize(y: Tensor, dtype: torch.dtype, next_inv_smooth: Tensor, next_down: Tensor, spec: LinearSpec):
    z = ACTIVATIONS[spec.activation](y).to(dtype)
    return quantize_act.reference(z, next_inv_smooth, next_down, spec.next)


def _fake_gelu_quantize(up: Tensor, m: int, n: int, next_inv_smooth: Tensor, next_down: Tensor, spec: LinearSpec):
    return empty_like_quantized(up, m, n, next_down, spec.next)


def _expect_next(
    up: Tensor, m: int, k: int, next_inv_smooth: Tensor, next_down: Tensor, spec: LinearSpec
) -> Iterable[Expected]:
    expect_that(spec.next is not None, "spec.next: expected how the next linear's input is quantized, got None")
    expect_matrix("next_down", "(rank, in)", next_down)
    return quantizer_tensors(k, next_inv_smooth, next_down, up.dtype, "next_")


def _glu_quantize(y: Tensor, dtype: torch.dtype, next_inv_smooth: Tensor, next_down: Tensor, spec: LinearSpec):
    first, second = y.chunk(2, dim=1)
    value, gate = (second, first) if spec.gate_first else (first, second)
    z = (value * ACTIVATIONS[spec.activation](gate)).to(dtype)
    return quantize_act.reference(z, next_inv_smooth, next_down, spec.next)


def _fake_glu_quantize(up: Tensor, m: int, n: int, next_inv_smooth: Tensor, next_down: Tensor, spec: LinearSpec):
    return empty_like_quantized(up, m, n // 2, next_down, spec.next)


def _check_glu(
    up: Tensor, m: int, n: int, next_inv_smooth: Tensor, next_down: Tensor, spec: LinearSpec
) -> Iterable[Expected]:
    expect_that(n % 2 == 0, f"qw: expected an even number of output channels, value and gate, got {n}")
    return _expect_next(up, m, n // 2, next_inv_smooth, next_down, spec)


def _qkv_rope(y: Tensor, dtype: torch.dtype, q_norm: Tensor, k_norm: Tensor, rotary: Tensor, spec: LinearSpec):
    q, k, v = y.chunk(3, dim=1)
    q, k = (_norm_rotate(part, weight.float(), rotary, spec) for part, weight in ((q, q_norm), (k, k_norm)))
    return q.to(dtype), k.to(dtype), v.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _norm_rotate(x: Tensor, weight: Tensor, rotary: Tensor, spec: LinearSpec) -> Tensor:
    """RMSNorm of each head of x (M,H·D), then pairs (2i, 2i+1) of row m turned by rotary[m % T, i] = (cos, sin)."""
    tokens, half, _ = rotary.shape
    heads = rms_norm(x.unflatten(1, (x.shape[1] // spec.head_dim, spec.head_dim)), spec.eps) * weight
    even, odd = heads.unflatten(0, (x.shape[0] // tokens, tokens)).unflatten(-1, (half, 2)).unbind(-1)
    cos, sin = rotary.unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).view(x.shape)


def _fake_qkv_rope(up: Tensor, m: int, n: int, q_norm: Tensor, k_norm: Tensor, rotary: Tensor, spec: LinearSpec):
    return tuple(up.new_empty((m, n // 3)) for _ in range(3))


def _check_qkv_rope(
    up: Tensor, m: int, n: int, q_norm: Tensor, k_norm: Tensor, rotary: Tensor, spec: LinearSpec
) -> Iterable[Expected]:
    dim, tokens = spec.head_dim, rotary.shape[0]
    expect_that(dim > 0 and dim % 2 == 0, f"spec.head_dim: expected an even number, got {dim}")
    expect_that(n % (3 * dim) == 0, f"qw: expected output channels for q, k and v in heads of {dim}, got {n}")
    expect_that(tokens > 0 and m % tokens == 0, f"rotary: expected tokens that divide the {m} rows, got {tokens}")
    yield "q_norm", q_norm, "(head dim)", (dim,), FLOATS
    yield "k_norm", k_norm, "(head dim)", (dim,), FLOATS
    yield "rotary", rotary, "(tokens, head dim/2, cos and sin)", (tokens, dim // 2, 2), (torch.float32,)


def _gate_residual(y: Tensor, dtype: torch.dtype, gate: Tensor, residual: Tensor, spec: LinearSpec) -> Tensor:
    m, n = y.shape
    gated = y.view(gate.shape[0], m // gate.shape[0], n) * gate.float().unsqueeze(1)
    return (residual.float() + gated.view(m, n)).to(dtype)


def _fake_gate_residual(up: Tensor, m: int, n: int, gate: Tensor, residual: Tensor, spec: LinearSpec) -> Tensor:
    return up.new_empty((m, n))


def _check_gate_residual(
    up: Tensor, m: int, n: int, gate: Tensor, residual: Tensor, spec: LinearSpec
) -> Iterable[Expected]:
    expect_matrix("gate", "(samples, out)", gate)
    samples = gate.shape[0]
    expect_that(samples > 0 and m % samples == 0, f"gate: expected samples that divide the {m} rows, got {samples}")
    yield "gate", gate, "(samples, out)", (samples, n), FLOATS
    yield "residual", residual, "(rows, out)", (m, n), (up.dtype,)


_NEXT = ("next_inv_smooth", "next_down")
EPILOGUES = (
    Epilogue("", (), 1, _store, _fake_store, _nothing_more, "y (M,N) in the dtype of up."),
    Epilogue("_gelu_quantize", _NEXT, 3, _gelu_quantize, _fake_gelu_quantize, _expect_next,
             "z = activation(y) in the dtype of up; "
             "quantize_act(z, next_inv_smooth (N), next_down (R',N), spec.next)."),
    Epilogue("_glu_quantize", _NEXT, 3, _glu_quantize, _fake_glu_quantize, _check_glu,
             "z = value·activation(gate) in the dtype of up, with y = cat(value, gate), or cat(gate, value) if "
             "spec.gate_first; quantize_act(z, next_inv_smooth (N/2), next_down (R',N/2), spec.next)."),
    Epilogue("_qkv_rope", ("q_norm", "k_norm", "rotary"), 3, _qkv_rope, _fake_qkv_rope, _check_qkv_rope,
             "q, k, v (M,N/3) of y = cat(q, k, v): RMSNorm per head (q_norm, k_norm (D), spec.eps), then row m of q "
             "and k rotated in pairs (2i, 2i+1) by rotary[m % T] (T,D/2,2) fp32 = (cos, sin)."),
    Epilogue("_gate_residual", ("gate", "residual"), 1, _gate_residual, _fake_gate_residual, _check_gate_residual,
             "residual (M,N) + gate·y, gate (B,N): rows b·M/B … belong to sample b."),
)
