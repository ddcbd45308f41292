"""csrc/cuda/linear_w4a16, executed on the host with every access checked, against the reference of the op."""
from __future__ import annotations

import pytest
import torch

from nunchaku_py.formats import group_count
from nunchaku_py.ops import ActSpec, LinearSpec, linear_w4a16


@pytest.mark.parametrize("name", ["int4_bfloat16", "uint4_bfloat16", "int4_float16"])
@pytest.mark.parametrize("m, n, k, r, group", [(1, 16, 64, 0, 64), (5, 23, 1120, 40, 64), (3, 9, 96, 16, 64),
                                               (2, 8, 384, 0, 128)])
def test_few_rows(library, name: str, m: int, n: int, k: int, r: int, group: int, order: dict) -> None:
    torch.manual_seed(m + n + k + r)
    weight, dtype = name.split("_")[0], getattr(torch, name.split("_")[1])
    groups = group_count(k, group)
    x, qw = torch.randn(m, k).to(dtype), torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales, zeros = (0.01 + torch.rand(n, groups) / 20).to(dtype), torch.randn(n, groups).to(dtype) / 4
    h, up, bias = torch.randn(m, r) / 8, torch.randn(n, r).to(dtype), torch.randn(n)
    y = torch.full((m, n), float("nan"), dtype=dtype)
    library.run(name, x, qw, scales, zeros, h, up, bias, y, m, n, k, r, group, **order)
    aux = zeros if weight == "uint4" else torch.empty(0)
    spec = LinearSpec(weight, group, k, ActSpec("none", group))
    want = linear_w4a16.reference(x, torch.empty(0), qw, scales, aux, h, up, bias, spec)
    # One rounding of y more or less, and sums of fp32 in another order.
    sums = x.double().abs().sum(1, keepdim=True) * 2 + 10
    near = torch.finfo(dtype).eps * want.double().abs() + sums * k * 2.0**-24
    assert ((y.double() - want.double()).abs() <= near).all()
