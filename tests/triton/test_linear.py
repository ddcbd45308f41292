"""The linear ops by Triton's kernels: every way to sum with every ending, in every configuration, within the bounds of
their arithmetic. The examples are those of the CPU engine (tests/backends), as far as these kernels take them."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from nunchaku_py import ops
from nunchaku_py.backends.triton import device as gpu
from tests.backends import cpu_bounds as bounds
from tests.backends.cpu_cases import Case, cases, gate_args, linear_args
from tests.triton.conftest import taken_for_gpu

EXAMPLES = os.environ.get("NUNCHAKU_PY_FUZZ")
FUZZ = settings(max_examples=int(EXAMPLES or 12), derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
GROUPS = {"int4": (64, 128), "uint4": (64, 128), "nvfp4": (16,)}
FAMILIES = ("linear_w4a8", "linear_w4a4", "linear_w4a16")
SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[(8, 9), (9, 0), (12, 0)], ids="{0[0]}.{0[1]}".format)
def as_any_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_for_gpu(monkeypatch, request.param)


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


def on_triton(name: str, case: Case, *args: object) -> object:
    """In one of the configurations, by the case's seed."""
    from nunchaku_py.kernels import linear

    def any_of(choices, problem, gpu_here):
        fitting = choices.ranked(problem, gpu_here)
        return fitting[case.seed % len(fitting)]

    chosen, linear.choose = linear.choose, any_of
    try:
        with ops.backend("triton"):
            return ops.OPS[name](*args)
    finally:
        linear.choose = chosen


def fuzz(family: str, check: Callable[[Case], None]) -> None:
    @FUZZ
    @given(cases(family))
    def run(case: Case) -> None:
        case = taken(family, case)
        assume(case.act != "nvfp4" or gpu.capability_of(None) in gpu.NVFP4)
        check(case)

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic(family: str, as_any_gpu: None) -> None:
    def check(case: Case) -> None:
        args = args_of(case)
        got = on_triton(family, case, *args)
        assert got.dtype == case.dtype and got.is_contiguous()
        bounds.assert_rounded_once(got, bounds.linear(*args))
        again = on_triton(family, case, *args)
        assert torch.equal(got.view(torch.int16), again.view(torch.int16))

    fuzz(family, check)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_residual(family: str, as_gpu: None) -> None:
    def check(case: Case) -> None:
        *args, spec = args_of(case)
        gate, residual = gate_args(case)
        got = on_triton(family + "_gate_residual", case, *args, gate, residual, spec)
        bounds.assert_rounded_once(got, bounds.gate_residual(bounds.linear(*args, spec), gate, residual))

    fuzz(family, check)
