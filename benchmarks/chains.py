"""What is timed: a linear, and linears with what surrounds them in a block, each as plain torch and as our fused ops.

A chain is an nn.Module of plain torch layers: torch runs it as it is, our unfused side with its linears replaced, our
fused side by the chain's `fused`, which calls the ops that a block of a quantized model would.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Layer
from benchmarks.sites import Setting, quantized
from nunchaku_py import ops
from nunchaku_py.linear import LINEAR_OPS, QuantizedInput, QuantLinear


class Chain(nn.Module):
    """y (M,N) of x (M,K); `gelu` names the linears whose input is a GELU's output."""

    op = "linear"
    gelu: tuple[str, ...] = ()

    def flops(self, m: int) -> int:
        return sum(2 * m * linear.weight.numel() for linear in self.modules() if isinstance(linear, nn.Linear))

    def quantize(self, setting: Setting) -> Chain:
        """Replace the linears, in place."""
        for name, linear in list(self.named_children()):
            setattr(self, name, quantized(linear, setting, name in self.gelu, getattr(self, "parts", ())))
        return self

    def example(self, m: int) -> Tensor:
        """An input like the real one."""
        return torch.randn(m, next(self.children()).in_features)

    def fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Linear(Chain):
    def __init__(self, layer: Layer, m: int) -> None:
        super().__init__()
        self.parts = layer.parts
        self.gelu = ("proj",) if layer.role in ("down", "single_out") else ()
        self.proj = nn.Linear(layer.k, layer.n)

    def example(self, m: int) -> Tensor:
        *others, last = super().example(m).split(self.parts, dim=1)
        return torch.cat([*others, F.gelu(last) if self.gelu else last], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Mlp(Chain):
    """down(gelu(up(x)))"""

    op, gelu = "mlp", ("down",)

    def __init__(self, layer: Layer, m: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(layer.k, layer.n), nn.Linear(layer.n, layer.k)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def fused(self, x: Tensor) -> Tensor:
        return _two_linears("_gelu_quantize", self.up, self.down, x, activation="gelu_tanh")


class GluMlp(Chain):
    """down(value·gelu(gate)), (value, gate) = up(x), as in SDXL"""

    op = "glu_mlp"

    def __init__(self, layer: Layer, m: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(layer.k, layer.n), nn.Linear(layer.n // 2, layer.k)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))

    def fused(self, x: Tensor) -> Tensor:
        return _two_linears("_glu_quantize", self.up, self.down, x, activation="gelu")


class GateResidual(Chain):
    """residual + gate·proj(x)"""

    op = "gate_residual"

    def __init__(self, layer: Layer, m: int) -> None:
        super().__init__()
        self.proj = nn.Linear(layer.k, layer.n)
        self.register_buffer("gate", torch.randn(1, layer.n))
        self.register_buffer("residual", torch.randn(m, layer.n))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual[: x.shape[0]] + self.gate * self.proj(x)

    def fused(self, x: Tensor) -> Tensor:
        residual = self.residual[: x.shape[0]]
        return fused_linear("_gate_residual", self.proj, self.proj.quantize_input(x), x.dtype, self.gate, residual)


class NormLinear(Chain):
    """proj(layernorm(x)·(1 + scale) + shift)"""

    op, eps = "norm_linear", 1e-6

    def __init__(self, layer: Layer, m: int) -> None:
        super().__init__()
        self.proj = nn.Linear(layer.k, layer.n)
        self.register_buffer("ones", torch.ones(layer.k))
        self.register_buffer("scale", 0.1 * torch.randn(1, layer.k))
        self.register_buffer("shift", 0.1 * torch.randn(1, layer.k))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.layer_norm(x, x.shape[1:], eps=self.eps) * (1 + self.scale) + self.shift)

    def fused(self, x: Tensor) -> Tensor:
        site = self.proj
        site.ensure_packed()
        spec = replace(site.linear_spec.act, norm="layer", eps=self.eps)
        down, _ = site.branch(x.dtype)
        found = ops.norm_modulate_quantize(x, self.ones, self.scale, self.shift, site.inv_smooth, down, spec)
        return site.multiply(QuantizedInput(*found), x.dtype)


def fused_linear(suffix: str, site: QuantLinear, x: QuantizedInput, dtype: torch.dtype, *extra: Tensor,
                 **spec: Any) -> Any:
    """What the op of this epilogue makes of a site's quantized input."""
    qw, sw, aux, up, bias = site.operands(dtype)
    changed = replace(site.linear_spec, **spec)
    op = ops.OPS[LINEAR_OPS[changed.act.format].name + suffix]
    return op(x.qx, x.sx, qw, sw, aux, x.h, up, bias, *extra, changed)


def _two_linears(suffix: str, first: QuantLinear, second: QuantLinear, x: Tensor, activation: str) -> Tensor:
    """first, its activation and the quantization for second in one op; then second."""
    second.ensure_packed()
    following = (second.inv_smooth, second.branch(x.dtype)[0])
    between = fused_linear(suffix, first, first.quantize_input(x), x.dtype, *following, activation=activation,
                           next=second.linear_spec.act)
    return second.multiply(QuantizedInput(*between), x.dtype)


CHAINS_OF_ROLE: dict[str, tuple[type[Chain], ...]] = {
    "qkv": (NormLinear,), "out": (GateResidual,), "up": (Mlp,), "geglu": (GluMlp,)}
