"""csrc/cuda/linear_w4a16, executed on the host with every access checked, against the reference of the op."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py.formats import group_count
from nunchaku_py.ops import ActSpec, LinearSpec, linear_w4a16
from tests.simt.build import Library, load


@pytest.mark.parametrize("name", ["int4_bfloat16", "uint4_bfloat16", "int4_float16"])
@pytest.mark.parametrize("m, n, k, r, group", [(1, 16, 64, 0, 64), (5, 23, 1120, 40, 64), (3, 9, 96, 16, 64),
                                               (2, 8, 384, 0, 128)])
def test_few_rows(library, name: str, m: int, n: int, k: int, r: int, group: int, order: dict) -> None:
    check(library, name, (m, n, k, r, group), order)


@pytest.mark.parametrize("name", ["uint4_bfloat16_many", "int4_float16_many"])
@pytest.mark.parametrize("m, n, k, r, group", [(1, 16, 64, 0, 64), (70, 144, 352, 48, 32), (64, 64, 96, 160, 64),
                                               (129, 80, 384, 0, 128)])
def test_many_rows(library, name: str, m: int, n: int, k: int, r: int, group: int, order: dict) -> None:
    check(library, name, (m, n, k, r, group), order)


def test_many_rows_on_sm_75(order: dict) -> None:
    check(load("linear_w4a16", "-DSIMT_TARGET=75"), "int4_float16_many", (70, 144, 352, 48, 32), order)


def test_many_rows_meet_no_bank_twice(library) -> None:
    counted = check(library, "int4_float16_many", (64, 64, 128, 0, 64), {})
    assert counted.ldmatrix_phases == counted.ldmatrix_matrices > 0


def check(library: Library, name: str, sizes: tuple[int, ...], order: dict):
    m, n, k, r, group = sizes
    torch.manual_seed(m + n + k + r)
    weight, dtype = name.split("_")[0], getattr(torch, name.split("_")[1])
    groups = group_count(k, group)
    x, qw = torch.randn(m, k).to(dtype), torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales, zeros = (0.01 + torch.rand(n, groups) / 20).to(dtype), torch.randn(n, groups).to(dtype) / 4
    h, up, bias = torch.randn(m, r) / 8, torch.randn(n, r).to(dtype), torch.randn(n)
    y = torch.full((m, n), float("nan"), dtype=dtype)
    counted = library.run(name, x, qw, scales, zeros, h, up, bias, y, m, n, k, r, group, **order)
    aux = zeros if weight == "uint4" else torch.empty(0)
    spec = LinearSpec(weight, group, k, ActSpec("none", group))
    want = linear_w4a16.reference(x, torch.empty(0), qw, scales, aux, h, up, bias, spec)
    assert ((y.double() - want.double()).abs() <= bound(want, x, h, up, k, name.endswith("many"))).all()
    return counted


def bound(want: Tensor, x: Tensor, h: Tensor, up: Tensor, k: int, rounds_h: bool) -> Tensor:
    """One rounding of y more or less, sums of fp32 in another order, and on the tensor cores h in 16 bit."""
    eps, branch = torch.finfo(x.dtype).eps, h.double().abs() @ up.double().abs().T
    sums = x.double().abs().sum(1, keepdim=True) * 2 + 10
    return eps * want.double().abs() + sums * k * 2.0**-24 + rounds_h * eps / 2 * branch
