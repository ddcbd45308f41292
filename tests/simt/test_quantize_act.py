"""csrc/cuda/quantize_act, executed on the host, against the reference of the op."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py.ops import ActSpec, quantize_act
from tests.simt.layouts import empty_of_tokens, tokens_in_rows


def quantized(library, x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec, ranks: int = 32, **mode: bool):
    """(qx, sx in row layout, h) of the kernel."""
    (m, k), r = x.shape, down.shape[0]
    qx = torch.full((m, k // 2), 0xAA, dtype=torch.uint8)
    sx = empty_of_tokens(m, x, k)
    h = torch.full((m, r), float("nan"))
    name = f"{str(x.dtype)[6:]}_{ranks}"
    library.run(name, x, inv_smooth, down, qx, sx, h, spec.shift, m, k, r, int(spec.format == "uint4"), **mode)
    return qx, tokens_in_rows(sx, m), h


def operands(m: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(m * 1000 + k + r)
    x = (torch.randn(m, k) * torch.rand(k).exp()).to(dtype)
    return x, 1 / (0.5 + torch.rand(k)), torch.randn(r, k).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("m, k, r", [(1, 64, 16), (33, 320, 0), (70, 448, 48), (16, 128, 40)])
@pytest.mark.parametrize("spec", [ActSpec("int4", 64), ActSpec("uint4", 64, 0.171875)], ids=["signed", "shifted"])
def test_codes_and_scales_are_the_references(library, dtype, m, k, r, spec, order) -> None:
    args = operands(m, k, r, dtype)
    qx, sx, h = quantized(library, *args, spec, **order)
    want_qx, want_sx, want_h = quantize_act.reference(*args, spec)
    assert torch.equal(qx, want_qx) and torch.equal(sx, want_sx)
    bound = args[0].double().abs() @ args[2].double().abs().T * (k + 16) * 2.0**-24
    assert ((h - want_h).abs() <= bound).all()


def test_more_ranks_than_a_pass(library) -> None:
    args = operands(20, 192, 80, torch.bfloat16)
    first, *others = [quantized(library, *args, ActSpec("int4", 64), ranks) for ranks in (16, 32, 64, 128)]
    for found in others:
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_group_and_no_other(library, bad: float) -> None:
    x, inv_smooth, down = operands(17, 192, 16, torch.float16)
    x[5, 70] = bad
    x[6, :64] = 0
    spec = ActSpec("int4", 64)
    qx, sx, _ = quantized(library, x, inv_smooth, down, spec)
    want_qx, want_sx, _ = quantize_act.reference(x, inv_smooth, down, spec)
    assert torch.equal(qx, want_qx) and torch.equal(sx.isnan(), want_sx.isnan()) and sx.isnan().sum() == 1
    assert torch.equal(sx.nan_to_num(), want_sx.nan_to_num())
