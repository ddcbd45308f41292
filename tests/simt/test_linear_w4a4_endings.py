"""The endings of csrc/cuda/linear_w4a4, executed on the host, against the references of their ops."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.ops import ActSpec, LinearSpec
from tests.simt.layouts import empty_of_tokens, of_channels, of_tokens, tokens_in_rows

ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}
EPS = torch.finfo(torch.bfloat16).eps


def operands(m: int, n: int, k: int, r: int) -> tuple[Tensor, ...]:
    """qx, sx, qw, sw, aux, h, up, bias in row layout, for y of about 1."""
    torch.manual_seed(m + n + k + r)
    small = 0.04 / k**0.5
    return (torch.randint(0, 256, (m, k // 2), dtype=torch.uint8), (small * (1 + torch.rand(m, k // 64))).bfloat16(),
            torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), (1 + torch.rand(n, k // 64)).bfloat16(),
            torch.empty(0), torch.randn(m, r) / (r + 1), torch.randn(n, r).bfloat16(), torch.randn(n) / 4)


def common(args: tuple[Tensor, ...], k: int) -> tuple:
    qx, sx, qw, sw, _, h, up, bias = args
    return (qx, of_tokens(sx), qw, of_channels(sw), h, up, bias,
            qx.shape[0], qw.shape[0], k, h.shape[1])


def empty(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=torch.bfloat16)


def assert_near(got: Tensor, want: Tensor) -> None:
    """As near as two roundings to 16 bit and one of h leave it, for values of about 1."""
    eps = torch.finfo(got.dtype).eps
    assert ((got.double() - want.double()).abs() <= eps * want.double().abs() + eps / 8).all()


def test_gate_residual(library, order: dict) -> None:
    m, n, k, r, samples = 70, 208, 192, 32, 2
    args = operands(m, n, k, r)
    gate, residual, y = torch.randn(samples, n).bfloat16(), torch.randn(m, n).bfloat16(), empty(m, n)
    library.run("gate_residual", *common(args, k), gate, residual, y, m // samples, **order)
    spec = LinearSpec("int4", 64, k, ActSpec("int4", 64))
    assert_near(y, ops.linear_w4a4_gate_residual.reference(*args, gate, residual, spec))


@pytest.mark.parametrize("head_dim, heads", [(128, 2), (64, 3), (32, 2)])
def test_qkv_rope(library, head_dim: int, heads: int) -> None:
    tokens, k, r = 35, 128, 16
    m, width = 2 * tokens, heads * head_dim
    args = operands(m, 3 * width, k, r)
    q_norm, k_norm = 1 + torch.rand(head_dim), 1 + torch.rand(head_dim)
    angles = torch.rand(tokens, head_dim // 2) * 6
    rotary = torch.stack([angles.cos(), angles.sin()], -1)
    found = [empty(m, width) for _ in range(3)]
    library.run("qkv_rope", *common(args, k), q_norm, k_norm, rotary, *found, head_dim, tokens, 1e-6)
    spec = LinearSpec("int4", 64, k, ActSpec("int4", 64), head_dim=head_dim)
    for got, want in zip(found, ops.linear_w4a4_qkv_rope.reference(*args, q_norm, k_norm, rotary, spec), strict=True):
        assert ((got.double() - want.double()).abs() <= EPS * want.double().abs() + EPS / 4).all()


def assert_same_act(found: tuple[Tensor, ...], want: tuple[Tensor, ...], k: int, spec: ActSpec) -> None:
    """z may have been rounded to the neighbour in 16 bit: then its code may be the next one, seldom."""
    from nunchaku_py.ops.quantize_act import unpack

    (codes, scales), (want_codes, want_scales) = (unpack(*part[:2], k, spec.fmt) for part in (found, want))
    off = (codes.int() - want_codes.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.02
    assert ((scales.double() - want_scales.double()).abs() <= 2 * EPS * want_scales.double()).all()
    assert ((found[2] - want[2]).abs() <= EPS * k**0.5 * 4).all()


@pytest.mark.parametrize("gated, activation, option", [
    (False, "gelu_tanh", 1), (False, "gelu", 0), (False, "silu", 0), (True, "gelu", 0), (True, "silu", 1)])
@pytest.mark.parametrize("tiles", [1, 2])
def test_next_act(library, gated: bool, activation: str, option: int, tiles: int) -> None:
    m, k, r, width, ranks = 71, 192, 16, 320, 40
    args = operands(m, width * (2 if gated else 1), k, r)
    inv_smooth, down = 0.5 + torch.rand(width), (torch.randn(ranks, width) / 4).bfloat16()
    shift = 0.171875 if option and not gated else 0.0
    act = ActSpec("uint4" if shift else "int4", 64, shift)
    qx, sx = torch.zeros(m, width // 2, dtype=torch.uint8), empty_of_tokens(m, down, width)
    h = torch.full((m, ranks), float("nan"))
    library.run("glu_quantize" if gated else "gelu_quantize", *common(args, k), inv_smooth, down, qx, sx, h, width,
                ranks, ACTIVATIONS[activation], option, shift, tiles)
    spec = LinearSpec("int4", 64, k, ActSpec("int4", 64), activation=activation, gate_first=bool(gated and option),
                      next=act)
    op = ops.linear_w4a4_glu_quantize if gated else ops.linear_w4a4_gelu_quantize
    want = op.reference(*args, inv_smooth, down, spec)
    assert_same_act((qx, tokens_in_rows(sx, m), h), want, width, act)
