"""The linear ops by Triton's kernels: every way to sum with every ending, in every configuration, within the bounds of
their arithmetic. The examples are those of the CPU engine (tests/backends), as far as these kernels take them.

NUNCHAKU_PY_FUZZ=100 tries that many random ones of each test, in place of a fixed few."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.backends.triton import device as gpu
from nunchaku_py.ops import ActSpec
from tests.backends import cpu_bounds as bounds
from tests.backends.cpu_cases import Case, cases, gate_args, linear_args, next_args, rope_args

EXAMPLES = os.environ.get("NUNCHAKU_PY_FUZZ")
FEW = 4 if torch.cuda.is_available() else 12  # each is compiled there
FUZZ = settings(max_examples=int(EXAMPLES or FEW), derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))
GROUPS = {"int4": (64, 128), "uint4": (64, 128), "nvfp4": (16,)}
FAMILIES = ("linear_w4a8", "linear_w4a4", "linear_w4a16")
SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["as_gpu", "as_blackwell", pytest.param("gpu", marks=pytest.mark.gpu)])
def any_device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: as on a GPU without an instruction for NVFP4, on one that has it, or on the one there is."""
    if request.param == "gpu":
        return "cuda"
    request.getfixturevalue(request.param)
    return "cpu"


def taken(family: str, case: Case) -> Case:
    """The case as near as these kernels take it."""
    weight, dtype = case.weight, case.dtype if case.dtype in SIXTEEN else torch.bfloat16
    if family == "linear_w4a4":
        weight = {"uint4": "int4"}.get(case.act, case.act)
        group = GROUPS[weight][case.seed % len(GROUPS[weight])]
    elif family == "linear_w4a16":
        weight = "int4" if weight == "int8" else weight
        group = 16 << case.seed % 4
    else:
        weight = "int8" if weight == "uint4" else weight
        group = 0 if weight == "int8" else 16 << case.seed % 4
    return replace(case, weight=weight, dtype=dtype, group=group, k=case.k + case.k % 2, row_scales=True)


def args_of(case: Case) -> tuple:
    """Arguments whose h has 16 bits, to which the kernels round it."""
    *args, spec = linear_args(case)
    args[5] = args[5].to(case.dtype).float()
    return *args, spec


def on_triton(device: str, name: str, case: Case, *args: object, like: tuple = ()) -> object:
    """In one of the configurations, by the case's seed; like: of those that fit this ending. The result here."""
    from nunchaku_py.kernels import linear

    def any_of(choices, problem, gpu_here):
        fitting = choices.ranked((*problem[:len(problem) - len(like)], *like), gpu_here)
        return fitting[case.seed % len(fitting)]

    chosen, linear.choose = linear.choose, any_of
    try:
        with ops.backend("triton"), np.errstate(all="ignore"):
            found = ops.OPS[name](*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
            return found.cpu() if isinstance(found, Tensor) else tuple(tensor.cpu() for tensor in found)
    finally:
        linear.choose = chosen


def fuzz(family: str, device: str, check: Callable[[Case], None]) -> None:
    has_nvfp4 = gpu.capability_of(torch.device(device)) in gpu.NVFP4

    @FUZZ
    @given(cases(family))
    def run(case: Case) -> None:
        case = taken(family, case)
        assume(case.act != "nvfp4" or has_nvfp4)
        check(case)

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic(family: str, any_device: str) -> None:
    def check(case: Case) -> None:
        args = args_of(case)
        got = on_triton(any_device, family, case, *args)
        assert got.dtype == case.dtype and got.is_contiguous()
        bounds.assert_rounded_once(got, bounds.linear(*args))
        again = on_triton(any_device, family, case, *args)
        assert torch.equal(got.view(torch.int16), again.view(torch.int16))

    fuzz(family, any_device, check)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_residual(family: str, device: str) -> None:
    def check(case: Case) -> None:
        *args, spec = args_of(case)
        gate, residual = gate_args(case)
        got = on_triton(device, family + "_gate_residual", case, *args, gate, residual, spec)
        bounds.assert_rounded_once(got, bounds.gate_residual(bounds.linear(*args, spec), gate, residual))

    fuzz(family, device, check)


@pytest.mark.parametrize("family", FAMILIES)
def test_qkv_rope(family: str, device: str) -> None:
    """v is rounded once; q and k are the reference's ending of some y within the bounds."""
    def check(case: Case) -> None:
        case = replace(case, n=12 * (case.n // 12 + 1))
        *args, spec = args_of(case)
        extra, spec = rope_args(case), replace(spec, head_dim=4)
        q, k, v = on_triton(device, family + "_qkv_rope", case, *args, *extra, spec)
        y = bounds.linear(*args, spec)
        bounds.assert_rounded_once(v, y.columns(slice(case.n // 3 * 2, None)))
        for part, (got, norm) in enumerate(((q, extra[0]), (k, extra[1]))):
            bounds.assert_rounded_once(got, turned(y.columns(slice(case.n // 3 * part, case.n // 3 * (part + 1))), norm,
                                                   extra[2], 4, spec.eps))

    fuzz(family, device, check)


def turned(y: bounds.Bounded, norm: Tensor, rotary: Tensor, dim: int, eps: float) -> bounds.Bounded:
    """RMSNorm of heads and RoPE in float64. What y may be off moves its head's norm by as much at most; twelve fp32
    roundings of the norm, of its weight, of the turn."""
    heads, slack = (t.unflatten(1, (-1, dim)) for t in (y.exact, y.slack))
    scale = (heads.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight = norm.double().abs().expand(dim)
    normed, off = heads * scale * norm.double(), weight * scale * (slack + slack.square().mean(-1, keepdim=True).sqrt())
    # Where the error is not small beside the head, the norm may be anything up to its largest, √D.
    rough = slack.amax(-1, keepdim=True) * scale > 0.01
    off = torch.where(rough, 2 * dim**0.5 * weight.expand_as(off), 1.05 * off) + 12 * bounds.U * normed.abs()
    angle = rotary.double()[torch.arange(len(heads)) % len(rotary)].unsqueeze(1)
    (even, odd), (loose, other) = (t.unflatten(-1, (dim // 2, 2)).unbind(-1) for t in (normed, off))
    cos, sin = angle.unbind(-1)
    exact = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(1)
    wide = torch.stack((loose * cos.abs() + other * sin.abs(), loose * sin.abs() + other * cos.abs()), -1).flatten(1)
    pairs = torch.stack((even.abs() + odd.abs(),) * 2, -1).flatten(1)
    head_size = y.size.unflatten(1, (-1, dim)).square().sum(-1, keepdim=True).expand(*heads.shape).flatten(1)
    # Beside an infinity stand zeros, beside NaN nothing but NaN: which of both y is, its bounds do not know.
    known = heads.isfinite().all(-1, keepdim=True).expand(*heads.shape).flatten(1)
    size = torch.where(known, torch.maximum(pairs, head_size), torch.inf)
    return bounds.Bounded(torch.where(known, exact, 0), wide + 4 * bounds.U * pairs, size)


def quantizing_ending(device: str, family: str, ending: str, case: Case) -> None:
    """The activated value is rounded once; what is made of it is quantize_act of that, its h summed in parts."""
    case = replace(case, n=case.n + (case.n % 2 if ending == "_gelu_quantize" else -case.n % 4))
    *args, spec = args_of(case)
    width = case.n // 2 if ending == "_glu_quantize" else case.n
    group = {"nvfp4": 16, "int8": 0, "none": 0}.get(case.next_act, 64)
    inv_smooth, down, following = next_args(replace(case, group=group), width)
    spec = replace(spec, activation=case.activation, gate_first=case.gate_first)
    like = ("quantize", following.group * (2 if ending == "_glu_quantize" else 1))
    z, _, _ = on_triton(device, family + ending, case, *args, torch.ones_like(inv_smooth), down,
                        replace(spec, next=ActSpec("none")), like=like)
    y = bounds.linear(*args, spec)
    bounds.assert_rounded_once(z, bounds.glu(y, case) if ending == "_glu_quantize" else
                               bounds.activate(y, case.activation))
    qx, sx, h = on_triton(device, family + ending, case, *args, inv_smooth, down, replace(spec, next=following),
                          like=like)
    for mine, want in zip((qx, sx), ops.quantize_act.reference(z, inv_smooth, down, following), strict=False):
        bounds.assert_same(mine, want)
    bounds.assert_rounded_once(h, bounds.product(z, down))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ending", ["_gelu_quantize", "_glu_quantize"])
def test_quantizing_endings(family: str, ending: str, device: str) -> None:
    fuzz(family, device, lambda case: quantizing_ending(device, family, ending, case))
