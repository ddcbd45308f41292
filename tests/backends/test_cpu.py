"""The CPU engine against the references, on every instruction set that this CPU has.

The set is chosen once per process: the one of this process is tested here, the others each in a process of its own.
NUNCHAKU_PY_FUZZ=1000 tries that many random examples of each test, in place of a fixed few.
"""
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from nunchaku_py import native
from nunchaku_py.backends import cpu
from nunchaku_py.formats import format_of
from nunchaku_py.ops import OPS, ActSpec, LinearSpec, backend
from nunchaku_py.ops.epilogue import EPILOGUES
from nunchaku_py.tensor import QTensor
from tests.backends import cpu_bounds as bounds
from tests.backends.cpu_cases import (
    Case,
    cases,
    fold,
    gate_args,
    linear_args,
    next_args,
    norm_args,
    quantize_args,
    rope_args,
)

pytestmark = pytest.mark.skipif(native.module is None, reason="no native module")
SWITCH = "NUNCHAKU_PY_CPU_ISA"
EXAMPLES = os.environ.get("NUNCHAKU_PY_FUZZ")
FUZZ = settings(max_examples=int(EXAMPLES or 25), derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
QKV_ROPE = next(epilogue for epilogue in EPILOGUES if epilogue.suffix == "_qkv_rope")
FAMILIES = ("linear_w4a8", "linear_w4a4", "linear_w4a16")
OVERFLOWING = frozenset({"nan", "zeros", "huge"})
PLAIN = Case(5, 33, 18, 3, torch.bfloat16, "int8", "int4", 16, 0)


def on_cpu(name: str, *args):
    with backend("cpu"):
        return OPS[name](*args)


def check_quantized(got: tuple, x: torch.Tensor, inv_smooth: torch.Tensor, down: torch.Tensor, spec: ActSpec) -> None:
    """qx and sx are the reference's bits for x, h is a sum in fp32."""
    for mine, reference in zip(got[:2], OPS["quantize_act"].reference(x, inv_smooth, down, spec), strict=False):
        bounds.assert_same(mine, reference)
    assert got[2].dtype == torch.float32
    bounds.assert_rounded_once(got[2], bounds.product(x, down))


@FUZZ
@given(cases(acts=("int4", "uint4", "nvfp4", "int8", "none")))
@example(replace(PLAIN, act="nvfp4", shift=-0.25))
def test_arithmetic_of_quantize_act(case: Case) -> None:
    args = quantize_args(case)
    check_quantized(on_cpu("quantize_act", *args), *args)


@FUZZ
@given(cases(acts=("int4", "uint4", "nvfp4", "int8", "none")))
def test_arithmetic_of_norm_modulate_quantize(case: Case) -> None:
    """The modulated value is rounded once, and what is made of it is quantize_act of that."""
    *args, inv_smooth, down, spec = norm_args(case)
    ones, keep = torch.ones_like(inv_smooth), ActSpec("none", norm=spec.norm, eps=spec.eps)
    value, _, _ = on_cpu("norm_modulate_quantize", *args, ones, down, keep)
    bounds.assert_rounded_once(value, bounds.modulated(*args, spec))
    check_quantized(on_cpu("norm_modulate_quantize", *args, inv_smooth, down, spec), value, inv_smooth, down,
                    replace(spec, norm="none"))


def check_linear(family: str, case: Case) -> None:
    args = linear_args(case)
    got = on_cpu(family, *args)
    assert got.dtype == case.dtype and got.is_contiguous()
    bounds.assert_rounded_once(got, bounds.linear(*args))


@FUZZ
@given(cases("linear_w4a8"))
def test_arithmetic_of_linear_w4a8(case: Case) -> None:
    check_linear("linear_w4a8", case)


@FUZZ
@given(cases("linear_w4a4"))
def test_arithmetic_of_linear_w4a4(case: Case) -> None:
    check_linear("linear_w4a4", case)


@FUZZ
@given(cases("linear_w4a16"))
@example(replace(PLAIN, m=0, k=400, act="none"))
@example(replace(PLAIN, m=1, k=1, n=2, dtype=torch.float16, act="none", weight="nvfp4", seed=105, spices=OVERFLOWING))
def test_arithmetic_of_linear_w4a16(case: Case) -> None:
    check_linear("linear_w4a16", case)


@FUZZ
@given(cases())
def test_arithmetic_of_the_fold(case: Case) -> None:
    """Tokens that are the unit vectors show every weight: w8·s_ch, exactly; and s_ch by itself."""
    case = replace(case, m=case.k, rank=0, dtype=torch.float32, act="int8")
    _, _, qw, sw, aux, *_, bias, spec = linear_args(case)
    weight, s_ch = fold(qw, sw, aux[case.n:] if spec.row_scales else aux, spec)
    unit, one = torch.eye(case.k, dtype=torch.int8), torch.ones(case.k)
    none = torch.empty(case.k, 0), torch.empty(case.n, 0), torch.zeros(case.n)
    bounds.assert_same(on_cpu("linear_w4a8", unit, one, qw, sw, aux, *none, spec), weight.T.float() * s_ch)
    if case.weight in ("int4", "nvfp4") and not spec.row_scales:
        q = QTensor(qw, sw, format_of(case.weight, case.group), case.k, None, aux if case.weight == "nvfp4" else None)
        bounds.assert_same(cpu.row_scales(q), s_ch)


@pytest.mark.parametrize("scale", [25 * 2.0**-149, 200 * 2.0**-149, 2.0**-126, 4.5e37, 1e38])
@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_arithmetic_of_the_fold_at_the_ends_of_fp32(name: str, scale: float) -> None:
    """A subnormal s_ch may leave weights beyond 127 of it; weights are finite where the largest code would not be."""
    codes = torch.tensor([[0x31, 0x73], [0x31, 0x13], [0x9F, 0x11]], dtype=torch.uint8)
    if name == "int4":
        scales, aux = torch.full((3, 1), scale), torch.empty(0)
    else:
        scales, aux = torch.full((3, 1), 1.5).to(torch.float8_e4m3fn), torch.full((3,), scale)
    spec = LinearSpec(name, 16, 4, ActSpec("int8"))
    weight, s_ch = fold(codes, scales, aux, spec)
    none = torch.empty(4, 0), torch.empty(3, 0), torch.zeros(3)
    got = on_cpu("linear_w4a8", torch.eye(4, dtype=torch.int8), torch.ones(4), codes, scales, aux, *none, spec)
    bounds.assert_same(got, weight.T.float() * s_ch)


def quantizing_ending(family: str, ending: str, case: Case) -> None:
    """The activated value is rounded once, and what is made of it is quantize_act of that."""
    case = replace(case, n=case.n + case.n % 2) if ending == "_glu_quantize" else case
    *args, spec = linear_args(case)
    inv_smooth, down, following = next_args(case, case.n // 2 if ending == "_glu_quantize" else case.n)
    spec = replace(spec, activation=case.activation, gate_first=case.gate_first)
    keep = replace(spec, next=ActSpec("none"))
    z, _, _ = on_cpu(family + ending, *args, torch.ones_like(inv_smooth), down, keep)
    y = bounds.linear(*args, spec)
    bounds.assert_rounded_once(z, bounds.glu(y, case) if ending == "_glu_quantize" else
                               bounds.activate(y, case.activation))
    got = on_cpu(family + ending, *args, inv_smooth, down, replace(spec, next=following))
    check_quantized(got, z, inv_smooth, down, following)


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_of_gelu_quantize(family: str) -> None:
    fuzz(cases(family), lambda case: quantizing_ending(family, "_gelu_quantize", case))


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_of_glu_quantize(family: str) -> None:
    fuzz(cases(family), lambda case: quantizing_ending(family, "_glu_quantize", case))


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_of_gate_residual(family: str) -> None:
    def check(case: Case) -> None:
        *args, spec = linear_args(case)
        gate, residual = gate_args(case)
        got = on_cpu(family + "_gate_residual", *args, gate, residual, spec)
        bounds.assert_rounded_once(got, bounds.gate_residual(bounds.linear(*args, spec), gate, residual))

    fuzz(cases(family), check)


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_of_qkv_rope(family: str) -> None:
    """v is rounded once; all of it is the reference's ending of y in fp32: the plain op's, where that stores fp32."""
    def check(case: Case) -> None:
        case = replace(case, n=12 * (case.n // 12 + 1))
        *args, spec = linear_args(case)
        extra, spec = rope_args(case), replace(spec, head_dim=4)
        got = on_cpu(family + "_qkv_rope", *args, *extra, spec)
        bounds.assert_rounded_once(got[2], bounds.linear(*args, spec).columns(slice(case.n // 3 * 2, None)))
        if case.dtype == torch.float32:
            wanted = QKV_ROPE.apply(on_cpu(family, *args, spec), case.dtype, *extra, spec)
            for mine, want in zip(got, wanted, strict=True):
                bounds.assert_same(mine, want)

    fuzz(cases(family), check)


def fuzz(strategy, check) -> None:
    FUZZ(given(strategy)(check))()


def other_isas() -> list[str]:
    if native.module is None or os.environ.get(SWITCH):
        return []
    return [name for name, obstacle in native.module.cpu_isas() if not obstacle and name != native.module.cpu_isa()]


@pytest.mark.parametrize("isa", other_isas())
def test_other_instruction_sets(isa: str) -> None:
    pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "arithmetic"]
    done = subprocess.run(pytest_again, env={**os.environ, SWITCH: isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_the_instruction_set_is_the_one_asked_for() -> None:
    names = [name for name, obstacle in native.module.cpu_isas() if not obstacle]
    assert native.module.cpu_isa() == os.environ.get(SWITCH, names[0])
