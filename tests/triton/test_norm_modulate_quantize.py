"""kernels/norm_modulate_quantize.py: the modulated value is rounded once, and the results are quantize_act of it."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from nunchaku_py.ops import ActSpec
from tests.backends import cpu_bounds as bounds
from tests.backends.cpu_cases import SPICES, Case, cases, norm_args
from tests.triton import bits

FUZZ = settings(max_examples=20, derandomize=True, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
PLAIN = Case(6, 75, 18, 3, torch.bfloat16, "int4", "int4", 16, 0)


def check(device: str, *args: Tensor | ActSpec) -> None:
    *modulation, inv_smooth, down, spec = args
    ones, keep = torch.ones_like(inv_smooth), ActSpec("none", norm=spec.norm, eps=spec.eps)
    value, sx, _ = bits.run(device, "norm_modulate_quantize", *modulation, ones, down, keep)
    assert sx.numel() == 0
    bounds.assert_rounded_once(value, bounds.modulated(*modulation, spec))
    got = bits.run(device, "norm_modulate_quantize", *args)
    bits.assert_quantized(got, value, inv_smooth, down, replace(spec, norm="none"))


@FUZZ
@given(cases(acts=bits.ACTS))
def arithmetic(case: Case) -> None:
    check(arithmetic.device, *norm_args(bits.taken(case)))


def test_arithmetic(device: str) -> None:
    arithmetic.device = device
    arithmetic()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("spice", sorted(set(SPICES) - {"huge"}))
def test_numbers_that_arithmetic_trips_over(device: str, norm: str, spice: str) -> None:
    for act in ("nvfp4", "int8"):
        check(device, *norm_args(replace(PLAIN, act=act, norm=norm, spices=frozenset({spice}))))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("m, k, r, samples, mean", [
    (34, 320, 40, 2, 0), (17, 128, 0, 1, 30), (66, 448, 16, 3, 0), (64, 192, 150, 2, 3000), (0, 64, 16, 1, 0)])
def test_sizes(device: str, norm: str, m: int, k: int, r: int, samples: int, mean: float) -> None:
    """Rows of one block that belong to two samples; a mean that is far larger than the distances from it."""
    dtype = torch.bfloat16 if norm == "layer" else torch.float16
    x = (mean + torch.randn(m, k) * torch.rand(k).exp()).to(dtype)
    scale, shift = ((torch.randn(samples, k) / by).to(dtype) for by in (4, 1))
    down = (torch.randn(r, k) / 4).to(dtype)
    for spec in (ActSpec("int4", 64, norm=norm), ActSpec("int8", norm=norm)):
        check(device, x, (1 + torch.rand(k)).to(dtype), scale, shift, 0.5 + torch.rand(k), down, spec)
