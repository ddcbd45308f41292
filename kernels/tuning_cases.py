"""What is measured of each kernel family: a function that makes a Case (tuner.py) of the sizes and the spec of a call.
A family is added by a function here and its name in FAMILIES.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nunchaku_py.formats import group_count
from nunchaku_py.ops.spec import ActSpec, AttentionSpec, LinearSpec

from . import attention, attention_config, linear, linear_w4a8, norm_modulate_quantize, quantize_act
from .config import Config
from .tuner import Case

OPS = {"int8": "linear_w4a8", "none": "linear_w4a16"}  # by the type of activations; others: linear_w4a4


class Tensors(NamedTuple):
    """Random ones; numbers as a model has them, as what a GPU multiplies changes its clock."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def floats(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device) + 0.5

    def small(self, *shape: int) -> Tensor:
        return 0.01 * self.floats(*shape)

    def codes(self, rows: int, k: int, format: str) -> Tensor:
        if format == "none":
            return self.normal(rows, k)
        if format == "int8":
            return torch.randint(-127, 128, (rows, k), device=self.device, dtype=torch.int8)
        return torch.randint(0, 256, (rows, -(-k // 2)), device=self.device, dtype=torch.uint8)

    def scales(self, rows: int, k: int, format: str, group: int) -> Tensor:
        if format in ("int8", "none"):
            return self.small(rows) if format == "int8" else self.floats(0)
        scales = self.small(rows, group_count(k, group))
        return scales.to(torch.float8_e4m3fn if format == "nvfp4" else self.dtype)

    def aux(self, n: int, spec: LinearSpec) -> Tensor:
        """What linear.py says of it."""
        own = {"nvfp4": self.small(n), "uint4": self.scales(n, spec.k, "uint4", spec.group or 1)}
        found = own.get(spec.weight, self.floats(0))
        return torch.cat((self.small(n), found)) if spec.row_scales else found

    def ended(self, suffix: str, m: int, n: int, rank: int, spec: LinearSpec) -> tuple[Tensor, ...]:
        """What an ending takes."""
        if suffix == "_gate_residual":
            return self.normal(1, n), self.normal(m, n)
        if suffix == "_qkv_rope":
            half = spec.head_dim // 2
            return self.floats(spec.head_dim), self.floats(spec.head_dim), self.floats(m, half, 2)
        width = n // 2 if suffix == "_glu_quantize" else n
        return (self.floats(width), self.normal(rank, width)) if suffix else ()


# ------------------------------------------------------------------------------------------------------------- families
def linear_case(suffix: str, m: int, n: int, rank: int, spec: LinearSpec, dtype: torch.dtype) -> Case:
    """A linear op with this ending: (m, spec.k) → (m, n)."""
    if linear.sum_of(spec) == "expand" and m > linear_w4a8.FEW_ROWS:
        spec = linear.with_int8(spec)  # which is launched then
    act, ending = spec.act.format, linear.ENDINGS[suffix]

    def operands(device: torch.device) -> tuple:
        make = Tensors(device, dtype)
        return (make.codes(m, spec.k, act), make.scales(m, spec.k, act, spec.act.group),
                make.codes(n, spec.k, spec.weight), make.scales(n, spec.k, spec.weight, spec.group), make.aux(n, spec),
                make.floats(m, rank), make.normal(n, rank), make.normal(n),
                *make.ended(suffix, m, n, rank, spec), spec)

    label = f"{act} x {spec.weight}, {m} rows, {spec.k} -> {n}, {ending}"
    return Case(OPS.get(act, "linear_w4a4") + suffix, label, linear.choices_of(spec),
                linear.problem_of(m, n, spec, ending), operands, partial(_linear, suffix))


def _linear(suffix: str, args: tuple, config: Config) -> object:
    return linear.linear(suffix, args, config)


def quantize_case(m: int, k: int, rank: int, spec: ActSpec, dtype: torch.dtype) -> Case:
    """quantize_act; after a norm norm_modulate_quantize."""
    normed = spec.norm != "none"
    module = norm_modulate_quantize.norm_modulate_quantize if normed else quantize_act.quantize_act

    def operands(device: torch.device) -> tuple:
        make = Tensors(device, dtype)
        norm = (make.normal(k), make.normal(1, k), make.normal(1, k)) if normed else ()
        return make.normal(m, k), *norm, make.floats(k), make.normal(rank, k), spec

    label = f"to {spec.format}, {m} rows of {k}, rank {rank}" + (f", after a {spec.norm} norm" if normed else "")
    return Case("norm_modulate_quantize" if normed else "quantize_act", label, quantize_act.CHOICES,
                quantize_act.problem_of(m, k, rank, spec, 1 if normed else 0), operands,
                lambda args, config: module(*args, config=config))


def attention_case(heads: int, tokens: int, dim: int, fp8: bool, dtype: torch.dtype) -> Case:
    """attention of all tokens to all, as diffusers lays them out."""
    def operands(device: torch.device) -> tuple:
        make = Tensors(device, dtype)
        q, k, v = (make.normal(1, tokens, heads, dim).transpose(1, 2) for _ in range(3))
        return q, k, v, AttentionSpec("fp8" if fp8 else "16bit")

    def call(args: tuple, config: Config) -> object:
        return attention.attention(*args, fp8, config)

    problem = attention_config.problem_of(heads, tokens, tokens, dim, fp8)
    return Case("attention", f"attention of {tokens} tokens, {heads} heads of {dim}", attention_config.CHOICES, problem,
                operands, call)


FAMILIES = {"linear": linear_case, "quantize": quantize_case, "attention": attention_case}


def case_of(family: str, args: tuple) -> Case:
    return FAMILIES[family](*args)
