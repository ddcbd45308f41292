"""Calls of the CUDA ops: operands in rows and packed, and how near a result must come."""
from __future__ import annotations

import torch
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.ops.spec import MMA
from tests.simt.layouts import of_channels, of_tokens, tokens_in_rows

CODES, PACKED = ActSpec("int4", 64), ActSpec("int4", 64, layout=MMA)


def run(op: ops.Op, device: str, *args: object) -> object:
    """op(*args) there, and the result here."""
    found = op(*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
    return found.cpu() if isinstance(found, Tensor) else tuple(tensor.cpu() for tensor in found)


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """qx, sx, qw, sw, aux, h, up, bias in row layout, for y of about 1, of which the branch is a small part."""
    torch.manual_seed(m + n + k + r)
    small, groups = 0.04 / k**0.5, -(-k // 64)
    return (torch.randint(0, 256, (m, k // 2), dtype=torch.uint8), (small * (1 + torch.rand(m, groups))).to(dtype),
            torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), (1 + torch.rand(n, groups)).to(dtype),
            torch.empty(0), torch.randn(m, r) / (8 * r + 1), torch.randn(n, r).to(dtype),
            (torch.randn(n) / 4).to(dtype))


def packed(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    qx, sx, qw, sw, *rest = args
    return (qx, of_tokens(sx), qw, of_channels(sw), *rest)


def specs(k: int, **more: object) -> tuple[LinearSpec, LinearSpec]:
    """(in rows, packed)"""
    return LinearSpec("int4", 64, k, CODES, **more), LinearSpec(
        "int4", 64, k, PACKED, layout=MMA, **{**more, "next": more.get("next") and PACKED})


def assert_same_quantized(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Scales as near as their rounding; codes equal but where a value lies between two; h near."""
    (qx, sx, h), (want_qx, want_sx, want_h) = got, want
    sx = tokens_in_rows(sx, h.shape[0])
    assert ((sx.double() - want_sx.double()).abs() <= 0.02 * want_sx.double()).all()
    off = [((a.int() >> shift & 15) - (b.int() >> shift & 15)).abs() for a, b in ((qx, want_qx),) for shift in (0, 4)]
    off = torch.minimum(torch.stack(off), 16 - torch.stack(off))
    assert off.max() <= 1 and (off > 0).double().mean() < 0.02
    torch.testing.assert_close(h, want_h, rtol=0, atol=0.02 * float(want_h.abs().amax(None)) if h.numel() else 0)
