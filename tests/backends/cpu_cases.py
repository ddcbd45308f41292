"""Arguments for the CPU ops at random: shapes, formats, memory layouts, and the numbers that arithmetic trips over."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_py.formats import decode, fold_int8, group_count
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.ops.linear import zeros_and_channel_scale
from nunchaku_py.ops.quantize_act import unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = (16, 32, 48, 64, 128, 0)
ACTIVATIONS = ("none", "gelu_tanh", "gelu", "silu")
SPICES = ("nan", "inf", "zeros", "subnormal", "huge")
PAIRS = {"linear_w4a8": (("int8",), ("int4", "uint4", "nvfp4", "int8")),
         "linear_w4a4": (("int4", "uint4", "nvfp4"), ("int4", "uint4", "nvfp4")),
         "linear_w4a16": (("none",), ("int4", "uint4", "nvfp4", "int8"))}


@dataclass(frozen=True)
class Case:
    """What a failing example prints. `rows_last`: matrices are transposed views; `shift` is that of the activation."""

    m: int
    k: int
    n: int
    rank: int
    dtype: torch.dtype
    act: str
    weight: str
    group: int
    seed: int
    spices: frozenset[str] = frozenset()
    rows_last: bool = False
    shift: float = 0.0
    norm: str = "layer"
    row_scales: bool = False
    activation: str = "gelu_tanh"
    gate_first: bool = False
    next_act: str = "int8"

    @property
    def act_spec(self) -> ActSpec:
        return act_spec(self.act, self.group, self.shift)


def act_spec(name: str, group: int, shift: float) -> ActSpec:
    return ActSpec(name, 0 if name in ("int8", "none") else group, shift)


def cases(family: str = "linear_w4a8", acts: tuple[str, ...] | None = None) -> st.SearchStrategy[Case]:
    """Cases of a linear's family; `acts`: of these activations instead."""
    own_acts, weights = PAIRS[family]
    return st.builds(
        Case, m=st.integers(0, 70), k=st.integers(1, 400), n=st.integers(1, 200), rank=st.integers(0, 70),
        dtype=st.sampled_from(DTYPES), act=st.sampled_from(acts or own_acts), weight=st.sampled_from(weights),
        group=st.sampled_from(GROUPS), seed=st.integers(0, 2**16), spices=st.frozensets(st.sampled_from(SPICES)),
        rows_last=st.booleans(), shift=st.sampled_from((0.0, 0.171875, -0.25)), norm=st.sampled_from(("layer", "rms")),
        row_scales=st.booleans(), activation=st.sampled_from(ACTIVATIONS), gate_first=st.booleans(),
        next_act=st.sampled_from(("int4", "uint4", "nvfp4", "int8", "none")))


class Maker:
    """The tensors of a case, one after the other from its seed."""

    def __init__(self, case: Case):
        self.case, self.random = case, torch.Generator().manual_seed(case.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random) + 0.25

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.laid_out(torch.randint(low, high, shape, generator=self.random).to(dtype))

    def one_of(self, *choices: object) -> object:
        return choices[int(torch.randint(len(choices), (), generator=self.random))]

    def laid_out(self, t: Tensor) -> Tensor:
        return t.T.contiguous().T if self.case.rows_last and t.ndim == 2 else t

    def spiced(self, t: Tensor, dtype: torch.dtype, without: tuple[str, ...] = ()) -> Tensor:
        """t in `dtype`, with the case's spices in a row, a column or an element each."""
        info, t = torch.finfo(dtype), t.clone()
        for spice in sorted(self.case.spices - set(without)):
            if not t.numel():
                break
            row = int(torch.randint(t.shape[0], (), generator=self.random))
            flat = int(torch.randint(t.numel(), (), generator=self.random))
            if spice == "zeros":
                t[row] = 0
            elif spice == "subnormal":
                t[row] *= info.tiny / 16
            elif spice == "huge":
                t[row] *= info.max / 8
            else:
                t.view(-1)[flat] = float(spice) * self.one_of(1, -1)
        return self.laid_out(t.clamp(-info.max, info.max).to(dtype) if "inf" not in self.case.spices else t.to(dtype))


def quantize_args(case: Case, without: tuple[str, ...] = ()) -> tuple:
    """x, inv_smooth, down, spec."""
    make = Maker(case)
    x = make.spiced(make.normal(case.m, case.k) * make.positive(case.k), case.dtype, without)
    down = make.spiced(make.normal(case.rank, case.k), case.dtype, ("huge", "nan", "inf"))
    return x, make.positive(case.k), down, case.act_spec


def norm_args(case: Case) -> tuple:
    """x, norm_weight, scale, shift, inv_smooth, down, spec; without numbers whose squares fp32 cannot hold."""
    x, inv_smooth, down, spec = quantize_args(case, ("huge",))
    make = Maker(case)
    samples = make.one_of(*(b for b in (1, 2, 3) if case.m % b == 0))
    x = x + make.laid_out(make.one_of(0.0, 3.0, 300.0) * make.normal(case.m, 1).expand(case.m, case.k)).to(case.dtype)
    weight, scale, shift = (make.normal(*shape).to(make.one_of(*DTYPES))
                            for shape in ((case.k,), (samples, case.k), (samples, case.k)))
    return x, weight, make.laid_out(scale), make.laid_out(shift), inv_smooth, down, replace(
        spec, norm=case.norm, eps=make.one_of(1e-6, 1e-5))


def codes_and_scales(make: Maker, rows: int, k: int, name: str, group: int, signed_scales: bool) -> tuple:
    """Any bytes as codes, the spare nibble of an odd row included, and scales of either sign if wanted."""
    if name == "int8":
        scales = make.positive(rows) * 0.01
        return make.integers(-127, 128, (rows, k), torch.int8), make.spiced(scales, torch.float32)
    codes = make.integers(0, 256, (rows, -(-k // 2)), torch.uint8)
    shape = (rows, group_count(k, group))
    if name == "nvfp4":
        nan = "nan" in make.case.spices
        return codes, make.integers(0, 128 if nan else 127, shape, torch.uint8).view(torch.float8_e4m3fn)
    scales = (make.normal(*shape) if signed_scales else make.positive(*shape)) * 0.1
    return codes, make.spiced(scales, make.one_of(*DTYPES))


def weight_args(make: Maker) -> tuple[Tensor, Tensor, Tensor]:
    """qw, sw, aux; without row_scales."""
    case = make.case
    qw, sw = codes_and_scales(make, case.n, case.k, case.weight, case.group, True)
    if case.weight == "uint4":
        return qw, sw, make.spiced(make.normal(*sw.shape), make.one_of(*DTYPES))
    if case.weight == "nvfp4":
        return qw, sw, make.spiced(make.normal(case.n) * 0.01, torch.float32)
    return qw, sw, torch.empty(0)


def linear_args(case: Case) -> tuple:
    """The nine arguments of a linear."""
    make = Maker(case)
    spec = LinearSpec(case.weight, 0 if case.weight == "int8" else case.group, case.k, case.act_spec)
    qw, sw, aux = weight_args(make)
    if case.act == "none":
        qx, sx = make.spiced(make.normal(case.m, case.k), case.dtype), torch.empty(0)
    else:
        qx, sx = codes_and_scales(make, case.m, case.k, case.act, case.group, False)
    if case.row_scales and case.act == "int8" and case.weight in ("int4", "nvfp4"):
        spec = replace(spec, row_scales=True)
        aux = torch.cat((fold(qw, sw, aux, spec)[1], aux))
    h = make.spiced(make.normal(case.m, case.rank), torch.float32, ("huge",))
    up = make.laid_out(make.normal(case.n, case.rank).to(case.dtype))
    return qx, sx, qw, sw, aux, h, up, make.normal(case.n).to(make.one_of(*DTYPES)), spec


def fold(qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """w8, s_ch by formats.fold_int8."""
    if spec.weight == "int8":
        return qw, sw
    return fold_int8(*unpack(qw, sw, spec.k, spec.fmt), spec.fmt, *zeros_and_channel_scale(aux, spec))


def decoded(qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> Tensor:
    """w (N,K) fp32."""
    return decode(*unpack(qw, sw, spec.k, spec.fmt), spec.fmt, *zeros_and_channel_scale(aux, spec))


def next_args(case: Case, width: int) -> tuple[Tensor, Tensor, ActSpec]:
    """next_inv_smooth, next_down, spec.next."""
    make = Maker(replace(case, seed=case.seed + 1))
    down = make.laid_out(make.normal(case.rank // 2, width).to(case.dtype))
    return make.positive(width), down, act_spec(case.next_act, case.group, case.shift)


def gate_args(case: Case) -> tuple[Tensor, Tensor]:
    """gate, residual."""
    make = Maker(replace(case, seed=case.seed + 1))
    samples = make.one_of(*(b for b in (1, 2, 3) if case.m % b == 0))
    gate = make.laid_out(make.normal(samples, case.n).to(make.one_of(*DTYPES)))
    return gate, make.spiced(make.normal(case.m, case.n), case.dtype)



def rope_args(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q_norm, k_norm, rotary for heads of 4."""
    make = Maker(replace(case, seed=case.seed + 1))
    angle = make.normal(max(case.m, 1), 2)
    norms = (make.positive(4).to(make.one_of(*DTYPES)) for _ in range(2))
    return *norms, torch.stack((angle.cos(), angle.sin()), -1)
