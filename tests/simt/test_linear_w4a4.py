"""csrc/cuda/linear_w4a4, executed on the host, against the reference of the op."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py.ops import ActSpec, LinearSpec, linear_w4a4
from tests.simt.build import Call, Library, load
from tests.simt.layouts import of_channels, of_tokens

KERNELS = ("large_int4_bfloat16", "large_uint4_float16", "medium_int4_bfloat16", "medium_uint4_float16",
           "small_int4_float16", "small_uint4_bfloat16")


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """qx, sx, qw, sw, aux, h, up, bias in row layout; no two groups alike."""
    torch.manual_seed(m + n + k + r)
    return (torch.randint(0, 256, (m, k // 2), dtype=torch.uint8), (0.01 + torch.rand(m, k // 64)).to(dtype),
            torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), (0.01 + torch.rand(n, k // 64)).to(dtype),
            torch.empty(0), torch.randn(m, r), torch.randn(n, r).to(dtype), torch.randn(n))


def multiplied(library, name: str, args: tuple[Tensor, ...], k: int, **mode: bool) -> tuple[Tensor, Call]:
    qx, sx, qw, sw, _, h, up, bias = args
    y = torch.full((qx.shape[0], qw.shape[0]), float("nan"), dtype=up.dtype)
    counted = library.run(name, qx, of_tokens(sx), qw, of_channels(sw),
                h, up, bias, y, *y.shape, k, h.shape[1], **mode)
    return y, counted


def bound(want: Tensor, args: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
    """What rounding may do: of both results to 16 bit, of h to 16 bit, and of each of the fp32 sums."""
    qx, sx, qw, sw, aux, h, up, bias = args
    eps = torch.finfo(up.dtype).eps
    branch = h.double().abs() @ up.double().abs().T
    sums = branch + bias.double().abs() + spec.k * 15 * 8 * sx.max().double() * sw.max().double()
    return eps * want.double().abs() + eps / 2 * branch + sums * (spec.k // 64 + h.shape[1] // 16 + 2) * 2.0**-23


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("m, n, k, r", [(1, 128, 64, 16), (130, 144, 192, 48), (63, 256, 320, 0), (40, 16, 128, 160)])
def test_linear(library, name: str, m: int, n: int, k: int, r: int, order: dict) -> None:
    _, act, dtype = name.split("_")
    args = operands(m, n, k, r, getattr(torch, dtype))
    spec = LinearSpec("int4", 64, k, ActSpec(act, 64))
    (got, _), want = multiplied(library, name, args, k, **order), linear_w4a4.reference(*args, spec)
    off = (got.double() - want.double()).abs() / bound(want, args, spec)
    assert off.max() <= 1, f"{off.max():.2f} times the bound"


def test_no_bank_conflicts_and_the_same_bits(library) -> None:
    args = operands(130, 144, 192, 48, torch.bfloat16)
    first, counted = multiplied(library, KERNELS[0], args, 192)
    assert torch.equal(first, multiplied(library, KERNELS[0], args, 192, reverse=True)[0])
    assert counted.ldmatrix_phases == counted.ldmatrix_matrices > 0


@pytest.mark.parametrize("name", ["medium_uint4_float16", "small_int4_float16"])
@pytest.mark.parametrize("m, n, k, r", [(1, 128, 64, 16), (130, 144, 192, 48), (63, 256, 320, 0)])
def test_on_sm_75(name: str, m: int, n: int, k: int, r: int, order: dict) -> None:
    """Other instructions, and another main loop."""
    _, act, _ = name.split("_")
    args = operands(m, n, k, r, torch.float16)
    spec = LinearSpec("int4", 64, k, ActSpec(act, 64))
    (got, _), want = multiplied(sm_75(), name, args, k, **order), linear_w4a4.reference(*args, spec)
    assert ((got.double() - want.double()).abs() <= bound(want, args, spec)).all()


def sm_75() -> Library:
    return load("linear_w4a4", "-DSIMT_TARGET=75")


@pytest.mark.parametrize("sizes", [[(70, 144, 192, 48), (1, 400, 64, 0)], [(3, 16, 128, 16), (200, 128, 320, 32)]])
@pytest.mark.parametrize("target", [75, 89])
def test_two_in_a_launch(library, sizes: list[tuple[int, ...]], target: int, order: dict) -> None:
    """The same bits as each by itself, whatever the sizes."""
    library = library if target == 89 else sm_75()
    calls = [operands(*size, torch.float16) for size in sizes]
    ys = [torch.full(size[:2], float("nan"), dtype=torch.float16) for size in sizes]
    arguments = [argument for args, y, size in zip(calls, ys, sizes, strict=True) for argument in (
        args[0], of_tokens(args[1]), args[2], of_channels(args[3]), *args[5:], y, *size)]
    library.run("two_medium_float16", *arguments, **order)
    for y, args, (_, _, k, _) in zip(ys, calls, sizes, strict=True):
        spec = LinearSpec("int4", 64, k, ActSpec("int4", 64))
        want = linear_w4a4.reference(*args, spec)
        assert ((y.double() - want.double()).abs() <= bound(want, args, spec)).all()
        if target == 89:
            assert torch.equal(y, multiplied(library, "medium_int4_float16", args, k)[0])
