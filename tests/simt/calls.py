"""Calls of the CUDA ops: operands in rows and packed, and how near a result must come."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.ops.spec import MMA
from tests.simt.layouts import of_channels, of_tokens, tokens_in_rows

SIZES = [(70, 384, 192, 16), (3, 768, 64, 0), (130, 384, 128, 32), (1, 384, 320, 160), (40, 384, 64, 48)]
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


def endings(dtype: torch.dtype, operands: Callable[..., tuple], packed: Callable[..., tuple],
            specs: Callable[..., tuple], act: ActSpec) -> Iterator[tuple[ops.Op, list[tuple], list[tuple]]]:
    """Every op of linear_w4a4, to some numbers: it, and the arguments of calls of SIZES, packed and in rows."""
    norms = 1 + torch.rand(64), 1 + torch.rand(64)
    for suffix, more_of, options in (
            ("", lambda m, n: (), {}),
            ("_gate_residual", lambda m, n: (torch.randn(1, n).to(dtype), torch.randn(m, n).to(dtype)), {}),
            ("_qkv_rope", lambda m, n: (*norms, torch.rand(m, 32, 2)), {"head_dim": 64}),
            ("_gelu_quantize", lambda m, n: (0.5 + torch.rand(n), (torch.randn(24, n) / n**0.5).to(dtype)),
             {"activation": "gelu_tanh", "next": act}),
            ("_glu_quantize", lambda m, n: (0.5 + torch.rand(n // 2), (torch.randn(20, n // 2) / n**0.5).to(dtype)),
             {"activation": "silu", "next": act})):
        rows, mma = [], []
        for m, n, k, r in SIZES:
            args, more, (row, pack) = operands(m, n, k, r, dtype), more_of(m, n), specs(k, **options)
            rows.append((*args, *more, row))
            mma.append((*packed(args), *more, pack))
        yield ops.OPS[f"linear_w4a4{suffix}"], mma, rows
