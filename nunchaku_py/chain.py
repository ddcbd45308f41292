"""Quantized linears one after another: what stands between them is computed in the ending of the first, or on the way
into the second, so that no 16-bit tensor is written and read again in between.
"""
from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .fusion import class_path
from .linear import LINEAR_OPS, QuantizedInput, QuantizedSite
from .module_tools import used_on
from .ops.spec import MMA, Activation, ActSpec, LinearSpec

NATIVE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
GELU, GLU, GATE_RESIDUAL = "_gelu_quantize", "_glu_quantize", "_gate_residual"
_ENDINGS = {name: {act: ops.OPS[op.name + name] for act, op in LINEAR_OPS.items()}
            for name in (GELU, GLU, GATE_RESIDUAL)}


class Between(NamedTuple):
    """What stands between two linears: activation(y), or value·activation(gate) of y's halves."""

    activation: Activation
    ending: str = GELU
    gate_first: bool = False


def between(first: QuantizedSite, x: QuantizedInput, what: Between, second: QuantizedSite, dtype: torch.dtype
            ) -> ops.Call:
    """What gives the tensors of second's QuantizedInput, from the quantized input of `first`."""
    second.ensure_packed(dtype)
    act = first.linear_spec.act.format
    spec = _quantizing_spec(first.linear_spec.token, what.activation, what.gate_first, second.linear_spec.act.token)
    down, _ = second.branch(dtype)
    operands = first.product(x, dtype).args[:-1]
    return ops.Call(_ENDINGS[what.ending][act], (*operands, second.inv_smooth, down, spec))


def gate_residual(site: QuantizedSite, x: QuantizedInput, gate: Tensor, residual: Tensor) -> ops.Call:
    """residual (M,N) + gate (B,N) · site(x), rounded once; `residual` may be (…,N)."""
    *operands, spec = site.product(x, residual.dtype).args
    rows = residual.reshape(-1, residual.shape[-1]).contiguous()
    return ops.Call(_ENDINGS[GATE_RESIDUAL][site.linear_spec.act.format], (*operands, gate.contiguous(), rows, spec))


def modulated(x: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor, site: QuantizedSite) -> QuantizedInput:
    """The quantized input norm(x)·(1+scale)+shift of `site`, and of all that share its input."""
    site.ensure_packed(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    down, _ = site.branch(x.dtype)
    return QuantizedInput(*ops.norm_modulate_quantize(
        rows, rows.new_ones(rows.shape[1]), scale.contiguous(), shift.contiguous(), site.inv_smooth, down,
        _normalizing_spec(site.linear_spec.act.token, norm.eps)))


# Called at every step: specs are built once. A compiler takes them for constants, as it cannot trace their making.
@torch.compiler.assume_constant_result
def _quantizing_spec(first: str, activation: Activation, gate_first: bool, second: str) -> LinearSpec:
    return _cached_quantizing_spec(first, activation, gate_first, second)


@cache
def _cached_quantizing_spec(first: str, activation: Activation, gate_first: bool, second: str) -> LinearSpec:
    return replace(LinearSpec.parse(first), activation=activation, gate_first=gate_first, next=ActSpec.parse(second))


@torch.compiler.assume_constant_result
def _normalizing_spec(act: str, eps: float) -> ActSpec:
    return _cached_normalizing_spec(act, eps)


@cache
def _cached_normalizing_spec(act: str, eps: float) -> ActSpec:
    return replace(ActSpec.parse(act), norm="layer", eps=eps)


# ------------------------------------------------------------------------------------------------ reasons to step aside
def no_ending(site: QuantizedSite, ending: str, reader: QuantizedSite | None = None) -> str | None:
    """A linear that runs natively is not given up for an ending that would run on torch; and the linear that reads what
    the ending makes takes it in the layout of this one."""
    site.ensure_packed()
    if reader is not None:
        reader.ensure_packed()
        mine, its = site.linear_spec.layout, reader.linear_spec.act.layout
        if mine != its:
            return f"it is packed as '{mine}', and the linear that reads its output as '{its}'"
        if mine == MMA and site.site.format != reader.site.format:
            return f"it is packed for {site.site.format}, and the linear that reads its output for {reader.site.format}"
        if mine == MMA and site.linear_spec.act.format == "uint4":
            return "its input is unsigned, which the kernels of this ending do not take"
    plain, act = LINEAR_OPS[site.linear_spec.act.format], site.linear_spec.act.format
    return _not_native(plain, _ENDINGS[ending][act], site)


def no_modulation(site: QuantizedSite) -> str | None:
    return _not_native(ops.quantize_act, ops.norm_modulate_quantize, site)


def _not_native(plain: ops.Op, fused: ops.Op, site: QuantizedSite) -> str | None:
    for name in NATIVE.get(used_on(site).type, ()):
        if name in plain.backends and name not in fused.backends:
            return f"{fused.name} is not built for {name}, which {plain.name} is"
    return None


def not_plain_norm(name: str, norm: nn.Module) -> str | None:
    if type(norm) is not nn.LayerNorm or norm.weight is not None or norm.bias is not None:
        return f"{name} is not a LayerNorm without weights, but {class_path(norm)}"
    return None


def active_dropout(modules: tuple[tuple[str, nn.Module], ...]) -> str | None:
    for name, module in modules:
        if type(module) is not nn.Dropout or (module.training and module.p > 0):
            return f"{name} is not idle: {module}"
    return None
