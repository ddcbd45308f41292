"""The static description an op is called with: what its tensors mean beyond their shapes.

A spec travels through torch.compile as its `token`, a string that `parse` turns back into the same object.
"""
from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from ..errors import NunchakuError
from ..formats import Format, format_of

ActName = Literal["int4", "uint4", "nvfp4", "int8", "none"]
WeightName = Literal["int4", "uint4", "nvfp4", "int8"]
Norm = Literal["none", "layer", "rms"]
Activation = Literal["none", "gelu_tanh", "gelu", "silu"]
Products = Literal["auto", "fp8", "16bit"]
_Spec = TypeVar("_Spec", bound="_Token")
# Layouts of tensors: codes and scales in rows, as files hold them; or codes in rows, and scales as the threads of a
# tensor core instruction read them, which multiplies 64 inputs at a time (csrc/cuda/common/scales.h).
ROW, MMA = "row", "mma"
MMA_ROWS = MMA_INPUTS = 64


def padded_rows(rows: int) -> int:
    """How many rows the scales of an MMA layout have for so many."""
    return -(-rows // MMA_ROWS) * MMA_ROWS


def mma_scales(format: str, rows: int, k: int) -> tuple[int, ...]:
    """The shape of a matrix's scales in the MMA layout: of a row and 64 of its inputs one, or NVFP4's four."""
    shape = -(-k // MMA_INPUTS), padded_rows(rows)
    return (*shape, 4) if format == "nvfp4" else shape


class _Token:
    """What all specs share: checked literals, and a token computed once."""

    token: str

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            choices = [c for c in get_args(hint) if isinstance(c, str)]
            if choices and getattr(self, name) not in choices:
                expected, got = ", ".join(choices), getattr(self, name)
                raise NunchakuError(f"{type(self).__name__}.{name}: expected one of {expected}, got {got!r}")
        object.__setattr__(self, "token", json.dumps(_plain(self), separators=(",", ":")))

    @classmethod
    @cache
    def parse(cls: type[_Spec], token: str) -> _Spec:
        """The spec whose token this is."""
        values = json.loads(token)
        nested = {name: ActSpec.parse(_dumps(values[name])) for name in ("act", "next") if values.get(name)}
        return cls(**{**values, **nested})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _dumps(values: dict) -> str:
    return json.dumps(values, separators=(",", ":"))


def _plain(spec: _Token) -> dict[str, Any]:
    """The values that differ from their default, nested specs likewise."""
    values = {f: getattr(spec, f.name) for f in fields(spec) if f.init}
    kept = {f.name: value for f, value in values.items() if f.default is MISSING or value != f.default}
    return {name: _plain(value) if isinstance(value, _Token) else value for name, value in kept.items()}


def _expect_whole_rows(where: str, format: str, group: int) -> None:
    if format == "int8" and group:
        raise NunchakuError(f"{where}.group: int8 has one scale for the whole row (0), got groups of {group}")


@dataclass(frozen=True)
class ActSpec(_Token):
    """How an activation is quantized: x̂ = (norm(x) + shift)/smooth, then `format`; "none" keeps x̂ in 16 bit."""

    format: ActName
    group: int = 0
    shift: float = 0.0
    norm: Norm = "none"
    eps: float = 1e-6
    layout: str = ROW
    token: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect_whole_rows("ActSpec", self.format, self.group)

    @property
    def fmt(self) -> Format | None:
        """The number format, None for 16 bit."""
        return None if self.format == "none" else format_of(self.format, self.group)

    @property
    def layouts(self) -> tuple[str, ...]:
        return (self.layout,)


@dataclass(frozen=True)
class LinearSpec(_Token):
    """A quantized linear: how its weight (N,k) and its input are stored, and what its epilogue does.

    `row_scales`, for 4-bit weights that linear_w4a8 folds in every call: aux begins with what the rows' INT8 scales
    will be, so that they need not be found anew. `activation` and `next` concern …_gelu_quantize and …_glu_quantize,
    `gate_first` the latter, `head_dim` and `eps` …_qkv_rope.
    """

    weight: WeightName
    group: int
    k: int
    act: ActSpec
    layout: str = ROW
    row_scales: bool = False
    activation: Activation = "none"
    gate_first: bool = False
    next: ActSpec | None = None
    head_dim: int = 0
    eps: float = 1e-6
    token: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect_whole_rows("LinearSpec", self.weight, self.group)

    @property
    def fmt(self) -> Format:
        return format_of(self.weight, self.group)

    @property
    def layouts(self) -> tuple[str, ...]:
        return (self.layout, self.act.layout, *(self.next.layouts if self.next else ()))


@dataclass(frozen=True)
class AttentionSpec(_Token):
    """How attention may be computed. `products`: what P·V is multiplied in by backends that quantize, of which "auto"
    takes FP8 where the GPU has it and 16 bit elsewhere; `scale`: of the scores, 1/√(head dim) if it is None."""

    products: Products = "auto"
    scale: float | None = None
    token: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not math.isfinite(self.scale):
            raise NunchakuError(f"AttentionSpec.scale: expected a finite number, got {self.scale}")

    def scale_of(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale

    @property
    def layouts(self) -> tuple[str, ...]:
        return ()
