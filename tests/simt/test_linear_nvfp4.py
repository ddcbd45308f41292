"""csrc/cuda/linear_w4a4 on NVFP4, executed on the host with every access checked, against the references of its ops."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py import ops
from tests.simt.build import Call
from tests.simt.nvfp4 import CODES, assert_near, assert_same_quantized, bound, empty_scales, operands, packed, specs

KERNELS = [f"{tile}_{dtype}" for tile in ("large", "medium", "small") for dtype in ("bfloat16", "float16")]
SIZES = [(1, 128, 64, 16), (130, 144, 192, 48), (63, 256, 320, 0), (40, 16, 128, 160)]
SMALL = 1 / 8  # of y, what rounds h to 16 bit
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}


def arguments(args: tuple[Tensor, ...]) -> tuple:
    """As the exported functions take them."""
    (m, half), n, r = args[0].shape, args[2].shape[0], args[5].shape[1]
    return *packed(args), m, n, 2 * half, r


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def multiplied(library, name: str, args: tuple[Tensor, ...], **mode: bool) -> tuple[Tensor, Call]:
    y = empty(args[0].shape[0], args[2].shape[0], dtype=args[6].dtype)
    return y, library.run(name, *arguments(args), y, **mode)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("m, n, k, r", SIZES)
def test_linear(library, name: str, m: int, n: int, k: int, r: int, order: dict, rounding: dict) -> None:
    args = operands(m, n, k, r, getattr(torch, name.split("_")[1]))
    spec, _ = specs(k)
    (got, _), want = multiplied(library, name, args, **order, **rounding), ops.linear_w4a4.reference(*args, spec)
    off = (got.double() - want.double()).abs() / bound(want, args, spec)
    assert off.max() <= 1, f"{off.max():.2f} times the bound"


@pytest.mark.parametrize("name", KERNELS)
def test_no_bank_conflicts_and_the_same_bits(library, name: str) -> None:
    args = operands(130, 144, 192, 48, getattr(torch, name.split("_")[1]))
    first, counted = multiplied(library, name, args)
    assert torch.equal(first, multiplied(library, name, args, reverse=True)[0])
    assert counted.ldmatrix_phases == counted.ldmatrix_matrices > 0


def test_every_tile_gives_the_same_bits(library) -> None:
    """They sum alike: 64 inputs at a time, in their order."""
    args = operands(70, 160, 320, 32, torch.bfloat16)
    large, medium, small = (multiplied(library, f"{tile}_bfloat16", args)[0] for tile in ("large", "medium", "small"))
    assert torch.equal(large, medium) and torch.equal(large, small)


def test_each_scale_is_of_its_group(library) -> None:
    """One group of one row of x and of w at a time: everything else is zero, and the result exact."""
    m, n, k = 70, 144, 128
    qx, sx, qw, sw, aux, h, up, bias = operands(m, n, k, 0, torch.float16)
    aux, bias = torch.ones(n), torch.zeros(n)
    for row, channel, group in ((0, 0, 0), (9, 17, 3), (23, 95, 4), (69, 143, 7), (64, 31, 5), (48, 64, 2)):
        x, w = torch.zeros_like(qx), torch.zeros_like(qw)
        x[row, group * 8:group * 8 + 8] = 0x22  # 1
        w[channel, group * 8:group * 8 + 8] = 0x22
        args = (x, sx, w, sw, aux, h, up, bias)
        want = torch.zeros(m, n)
        want[row, channel] = 16 * sx[row, group].float() * sw[channel, group].float()
        for tile in ("large", "medium", "small"):
            assert torch.equal(multiplied(library, f"{tile}_float16", args)[0], want.half())


def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(library) -> None:
    args = operands(35, 64, 128, 16, torch.bfloat16)
    spoiled = args[1].clone()
    spoiled.view(torch.uint8)[20, 5] = 0x7F
    plain, y = (multiplied(library, "small_bfloat16", (args[0], sx, *args[2:]))[0] for sx in (args[1], spoiled))
    kept = torch.arange(35) != 20
    assert y[20].isnan().all() and torch.equal(y[kept], plain[kept])


def test_gate_residual(library, order: dict, rounding: dict) -> None:
    m, n, k, r, samples = 70, 208, 192, 32, 2
    args, (spec, _) = operands(m, n, k, r, torch.bfloat16, SMALL), specs(k)
    gate, residual, y = torch.randn(samples, n).bfloat16(), torch.randn(m, n).bfloat16(), empty(m, n)
    library.run("gate_residual", *arguments(args), gate, residual, y, samples, **order, **rounding)
    assert_near(y, ops.linear_w4a4_gate_residual.reference(*args, gate, residual, spec))


@pytest.mark.parametrize("head_dim, heads", [(128, 2), (64, 3), (32, 2)])
def test_qkv_rope(library, head_dim: int, heads: int, order: dict) -> None:
    tokens, k, r = 35, 128, 16
    m, width = 2 * tokens, heads * head_dim
    args, (spec, _) = operands(m, 3 * width, k, r, torch.float16, SMALL), specs(k, head_dim=head_dim)
    q_norm, k_norm = 1 + torch.rand(head_dim), 1 + torch.rand(head_dim)
    angles = torch.rand(tokens, head_dim // 2) * 6
    rotary = torch.stack([angles.cos(), angles.sin()], -1)
    found = [empty(m, width, dtype=torch.float16) for _ in range(3)]
    library.run("qkv_rope", *arguments(args), q_norm, k_norm, rotary, *found, head_dim, tokens, 1e-6, **order)
    want = ops.linear_w4a4_qkv_rope.reference(*args, q_norm, k_norm, rotary, spec)
    eps = torch.finfo(torch.float16).eps
    for got, expected in zip(found, want, strict=True):
        assert ((got.double() - expected.double()).abs() <= eps * expected.double().abs() + eps / 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("m", [1, 200])
def test_gelu_quantize(library, m: int, activation: str, dtype: torch.dtype, order: dict) -> None:
    check_next(library, "gelu_quantize", m, 320, dtype, order, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "silu"])  # GEGLU, SwiGLU
@pytest.mark.parametrize("gate_first", [False, True])
def test_glu_quantize(library, activation: str, gate_first: bool, dtype: torch.dtype, order: dict) -> None:
    check_next(library, "glu_quantize", 71, 320, dtype, order, activation=activation, gate_first=gate_first)


def check_next(library, ending: str, m: int, width: int, dtype: torch.dtype, order: dict, **options) -> None:
    k, r, ranks = 192, 16, 40
    args = operands(m, width * (1 + (ending == "glu_quantize")), k, r, dtype, SMALL)
    inv_smooth, down = 0.5 + torch.rand(width), (torch.randn(ranks, width) / width**0.5).to(dtype)
    qx, sx, h = torch.zeros(m, width // 2, dtype=torch.uint8), empty_scales(m, width), torch.full((m, ranks), torch.nan)
    library.run(f"{ending}_{str(dtype)[6:]}", *arguments(args), inv_smooth, down, qx, sx, h, ranks,
                ACTIVATIONS[options["activation"]], int(options.get("gate_first", False)), **order)
    spec, _ = specs(k, next=CODES, **options)
    want = ops.OPS[f"linear_w4a4_{ending}"].reference(*args, inv_smooth, down, spec)
    assert_same_quantized((qx, sx, h), want, dtype)
    assert (sx[:, m:] == 0xFF).all()
