"""NVFP4 operands of the CUDA ops, in rows and packed, and how near a result must come."""
from __future__ import annotations

import torch
from torch import Tensor

from nunchaku_py.backends.cuda import packed_scales
from nunchaku_py.formats import NVFP4, decode
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.ops.linear import decode_weight
from nunchaku_py.ops.quantize_act import unpack
from nunchaku_py.ops.spec import MMA, mma_scales

CODES, PACKED = ActSpec("nvfp4", 16), ActSpec("nvfp4", 16, layout=MMA)


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype, branch: float = 1.0) -> tuple[Tensor, ...]:
    """qx, sx, qw, sw, aux, h, up, bias in row layout, for y of about 1; the branch is about `branch` at most."""
    torch.manual_seed(m + n + k + r)

    def scales(rows: int) -> Tensor:
        return (0.5 + 4 * torch.rand(rows, k // 16)).to(torch.float8_e4m3fn)

    return (torch.randint(0, 256, (m, k // 2), dtype=torch.uint8), scales(m),
            torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), scales(n),
            (0.5 + torch.rand(n)) / (64 * k**0.5), torch.randn(m, r) * (branch / (r + 1)), torch.randn(n, r).to(dtype),
            torch.randn(n) / 4)


def packed(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    qx, sx, qw, sw, *rest = args
    return (qx, in_words(sx), qw, packed_scales(sw, torch.bfloat16), *rest)


def in_words(sx: Tensor) -> Tensor:
    """An activation's scales (M,G) as kernels leave them: beyond the last row is what was in memory, here NaN."""
    words = empty_scales(sx.shape[0], 16 * sx.shape[1])
    words[:, :sx.shape[0]] = sx.view(torch.uint8).unflatten(1, (-1, 4)).transpose(0, 1)
    return words.view(torch.float8_e4m3fn)


def empty_scales(rows: int, k: int) -> Tensor:
    """Where a kernel puts the scales of an activation (rows, k): NaN."""
    return torch.full(mma_scales("nvfp4", rows, k), 0xFF, dtype=torch.uint8)


def in_rows(words: Tensor, rows: int) -> Tensor:
    """(rows, G) of what a kernel put there."""
    words = words.view(torch.uint8)
    return words[:, :rows].transpose(0, 1).flatten(1).view(torch.float8_e4m3fn)


def specs(k: int, **more: object) -> tuple[LinearSpec, LinearSpec]:
    """(in rows, packed)"""
    return LinearSpec("nvfp4", 16, k, CODES, **more), LinearSpec(
        "nvfp4", 16, k, PACKED, layout=MMA, **{**more, "next": more.get("next") and PACKED})


def bound(want: Tensor, args: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
    """What rounding may do: of both results to 16 bit, of h to 16 bit, and of the fp32 sums, which the reference makes
    of single products and the kernel of 64 at a time."""
    qx, sx, qw, sw, aux, h, up, bias = args
    x = decoded(qx, sx, spec.k).double()
    w = decode_weight(qw, sw, aux, spec).double()
    eps, branch = torch.finfo(up.dtype).eps, h.double().abs() @ up.double().abs().T
    sums = x.abs() @ w.abs().T + branch + bias.double().abs()
    steps = spec.k // 64 + h.shape[1] // 16 + 3
    return eps * want.double().abs() + eps / 2 * branch + sums * (steps * 2.0**-23 + spec.k * 2.0**-24)


def decoded(qx: Tensor, sx: Tensor, k: int) -> Tensor:
    return decode(*unpack(qx, sx, k, NVFP4), NVFP4)


def assert_near(got: Tensor, want: Tensor) -> None:
    """As near as two roundings to 16 bit and one of h leave it, for values of about 1."""
    eps = torch.finfo(got.dtype).eps
    assert ((got.double() - want.double()).abs() <= eps * want.double().abs() + eps / 8).all()


def assert_same_quantized(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """z may have been rounded to its neighbour in 16 bit: then the scale of its group may be the next one, seldom, and
    its codes others; what they stand for is near. h is near."""
    (qx, sx, h), (want_qx, want_sx, want_h) = got, want
    k, sx = 2 * qx.shape[1], in_rows(sx, qx.shape[0])
    same = sx.view(torch.uint8) == want_sx.view(torch.uint8)
    assert (~same).double().mean() < 0.02
    group_tops = 6 * torch.maximum(sx.float(), want_sx.float()).repeat_interleave(16, 1)
    off = (decoded(qx, sx, k) - decoded(want_qx, want_sx, k)).abs()
    assert (off <= group_tops / 3 * 1.001).all()  # the widest step, from 4 to 6
    assert (qx != want_qx).double().mean() < 0.04
    eps = torch.finfo(dtype).eps
    assert ((h - want_h).abs() <= eps * (want_h.abs() + 4 * want_h.abs().amax())).all() if h.numel() else True
