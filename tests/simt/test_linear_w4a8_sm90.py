"""The Hopper kernel of linear_w4a8, executed on the host with races looked for: every tile, and its ring."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py import ops
from tests.simt.build import Library
from tests.simt.test_linear_w4a4_endings import assert_near
from tests.simt.test_linear_w4a8 import INT8, operands

TILES = (256, 192, 128)


def arguments(args: tuple[Tensor, ...], k: int) -> tuple:
    qx, sx, w8, s_ch, _, h, up, bias = args
    return qx, sx, w8, s_ch, h, up, bias.float(), qx.shape[0], w8.shape[0], k, h.shape[1]


def stored(library: Library, columns: int, args: tuple[Tensor, ...], k: int, **mode: bool) -> Tensor:
    y = torch.full((args[0].shape[0], args[2].shape[0]), float("nan"), dtype=args[6].dtype)
    library.run(f"stored_{columns}", *arguments(args, k), y, **mode)
    return y


def reference(args: tuple[Tensor, ...], k: int) -> Tensor:
    return ops.linear_w4a8.reference(*args, ops.LinearSpec("int8", 0, k, INT8))


@pytest.mark.parametrize("columns", TILES)
@pytest.mark.parametrize("m, n, k, r", [(1, 128, 64, 16), (300, 272, 704, 80), (257, 528, 192, 0)])
def test_tiles(library: Library, columns: int, m: int, n: int, k: int, r: int, order: dict, rounding: dict) -> None:
    """More stages than the ring has, more items than clusters, and edges of everything."""
    args = operands(m, n, k, r)
    assert_near(stored(library, columns, args, k, **order, **rounding), reference(args, k))


def test_the_same_bits_in_any_order(library: Library) -> None:
    args = operands(200, 400, 320, 48)
    first = stored(library, 192, args, 320)
    assert torch.equal(first, stored(library, 192, args, 320, reverse=True))
    assert torch.equal(first, stored(library, 256, args, 320))


@pytest.mark.parametrize("columns", TILES)
def test_value_and_gate_of_one_tile(library: Library, columns: int, order: dict) -> None:
    m, width, k, r = 140, 208, 128, 32
    args = operands(m, 2 * width, k, r, torch.float16)
    inv_smooth = 0.5 + torch.rand(width)
    z, tops = torch.full((m, width), float("nan"), dtype=torch.float16), torch.zeros(m)
    library.run(f"gated_{columns}", *arguments(args, k), inv_smooth, z, tops, **order)
    value, gate = ops.linear_w4a8.reference(
        *args[:6], args[6].float(), args[7], ops.LinearSpec("int8", 0, k, INT8)).chunk(2, dim=1)
    assert_near(z, (value * torch.nn.functional.silu(gate)).half())
    assert torch.equal(tops, (z.float() * inv_smooth).abs().amax(1))


def test_two_in_a_launch(library: Library, order: dict) -> None:
    """Each as by itself, though the ring goes on from one to the other."""
    calls = [operands(70, 144, 192, 48), operands(400, 96, 448, 0)]
    ys = [torch.full((args[0].shape[0], args[2].shape[0]), float("nan"), dtype=torch.bfloat16) for args in calls]
    library.run("two", *arguments(calls[0], 192), ys[0], *arguments(calls[1], 448), ys[1], **order)
    for y, args, k in zip(ys, calls, (192, 448), strict=True):
        assert torch.equal(y, stored(library, 128, args, k))
        assert_near(y, reference(args, k))
