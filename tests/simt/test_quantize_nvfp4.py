"""quantize_act and norm_modulate_quantize to NVFP4 by the CUDA kernels, executed on the host, against the references:
the same bits."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py.ops import ActSpec, norm_modulate_quantize, quantize_act
from tests.simt.nvfp4 import CODES, empty_scales, in_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


def quantized(library, name: str, x: Tensor, *more: Tensor, last: tuple = (), **mode: bool) -> tuple[Tensor, ...]:
    """(qx, sx in row layout, h) of the kernel."""
    (m, k), r = x.shape, more[-1].shape[0]
    qx, sx, h = torch.full((m, k // 2), 0xAA, dtype=torch.uint8), empty_scales(m, k), torch.full((m, r), torch.nan)
    library.run(name, x, *more, qx, sx, h, m, k, r, *last, **mode)
    assert (sx[:, m:] == 0xFF).all()
    return qx, in_rows(sx, m), h


def operands(m: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(m * 1000 + k + r)
    x = (torch.randn(m, k) * torch.rand(k).exp()).to(dtype)
    return x, 1 / (0.5 + torch.rand(k)), torch.randn(r, k).to(dtype)


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Scales that are NaN may be any."""
    nan = want[1].float().isnan()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1].float().isnan(), nan)
    assert torch.equal(got[1].view(torch.uint8)[~nan], want[1].view(torch.uint8)[~nan])


@DTYPES
@pytest.mark.parametrize("m, k, r", [(1, 64, 16), (33, 320, 0), (70, 448, 48), (16, 128, 150)])
def test_codes_and_scales_are_the_references(library, dtype: torch.dtype, m: int, k: int, r: int, order: dict) -> None:
    args = operands(m, k, r, dtype)
    got, want = quantized(library, str(dtype)[6:], *args, **order), quantize_act.reference(*args, CODES)
    assert_same_bits(got, want)
    bound = args[0].double().abs() @ args[2].double().abs().T * (k + 16) * 2.0**-24
    assert ((got[2] - want[2]).abs() <= bound).all()


@DTYPES
@pytest.mark.parametrize("size", [1e-6, 3e-3, 0.011, 30.0, 2000.0, 60000.0])
def test_scales_of_every_size(library, dtype: torch.dtype, size: float) -> None:
    """Those that are too small to be stored, subnormal ones, and those too large: codes saturate."""
    x, inv_smooth, down = operands(33, 256, 0, dtype)
    x = (size * x.float().clamp(-4, 4) / 4).to(dtype)
    assert_same_bits(quantized(library, str(dtype)[6:], x, inv_smooth, down),
                     quantize_act.reference(x, inv_smooth, down, CODES))


def test_ties_and_signs(library) -> None:
    """x/scale half way between codes, and what rounds to zero: it keeps its sign."""
    steps = torch.arange(-96, 96) / 16
    x = torch.cat([steps, -steps, torch.full((64,), -0.0)]).view(-1, 64)[:, :63]
    x = torch.cat([x.reshape(-1), torch.zeros(7 * 64)])[:7 * 64].view(7, 64)
    x[:, ::16] = 6  # scale 1
    x[6, 16:] = -0.0
    x = x.bfloat16()
    none = torch.empty(0, 64).bfloat16()
    got, want = quantized(library, "bfloat16", x, torch.ones(64), none), quantize_act.reference(
        x, torch.ones(64), none, CODES)
    assert_same_bits(got, want)
    assert (got[1][:6].float() == 1).all() and (got[0][:, 1:] & 0x0F == 8).any() and (got[0][6, 8:] == 0).all()


@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_group_and_no_other(library, bad: float, dtype: torch.dtype) -> None:
    x, inv_smooth, down = operands(17, 192, 16, dtype)
    x[5, 70] = bad
    x[6, :64] = 0
    got, want = quantized(library, str(dtype)[6:], x, inv_smooth, down), quantize_act.reference(
        x, inv_smooth, down, CODES)
    assert_same_bits(got, want)
    assert got[1].float().isnan().sum() == 1


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("m, k, r, samples, mean", [(34, 320, 40, 2, 0), (17, 128, 0, 1, 30), (66, 448, 16, 3, 0)])
def test_norm_modulate_quantize(library, norm: str, m: int, k: int, r: int, samples: int, mean: int,
                                order: dict) -> None:
    """The same bits as quantizing the normed value, wherever that is the reference's; it may be its neighbour."""
    dtype = torch.bfloat16 if norm == "layer" else torch.float16
    torch.manual_seed(m + k)
    x = (mean + torch.randn(m, k) * torch.rand(k).exp()).to(dtype)
    weight = (1 + torch.rand(k)).to(dtype)
    scale, shift = ((torch.randn(samples, k) / by).to(dtype) for by in (4, 1))
    inv_smooth, down = 0.5 + torch.rand(k), (torch.randn(r, k) / 4).to(dtype)
    got = quantized(library, norm, x, weight, scale, shift, inv_smooth, down, last=(m // samples, 1e-6), **order)
    spec = ActSpec("nvfp4", 16, norm=norm, eps=1e-6)
    want = norm_modulate_quantize.reference(x, weight, scale, shift, inv_smooth, down, spec)
    other = (got[1].view(torch.uint8) != want[1].view(torch.uint8)).repeat_interleave(8, 1)
    assert other.double().mean() < 0.01 and (got[0] != want[0]).double().mean() < 0.01
    eps = torch.finfo(dtype).eps
    assert ((got[2] - want[2]).abs() <= 4 * eps * k**0.5).all()
