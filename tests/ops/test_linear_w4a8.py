"""linear_w4a8: the integers are exact, folded before or in the op."""
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import fold_int8
from nunchaku_py.ops import linear_w4a8
from nunchaku_py.ops.linear_w4a8 import int8_matmul
from nunchaku_py.ops.quantize_act import unpack
from tests.ops.helpers import ACTS, SHAPES, WEIGHTS, assert_rounded, linear_args, slow_linear

MODULE = import_module("nunchaku_py.ops.linear_w4a8")
ODD = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (5, 1, 3), (3, 5, 7), (17, 33, 9), (4, 3073, 31)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_format", WEIGHTS)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 65, 7, 2), (2, 1, 1, 0), (2, 0, 3, 1)])
def test_formula(shape, folded, weight_format, dtype):
    args = linear_args("linear_w4a8", shape, "int8", weight_format, dtype, folded)
    y = linear_w4a8(*args)
    assert y.dtype == dtype
    assert_rounded(y, *slow_linear(*args))


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("m, k, n", ODD)
def test_int8_matmul_is_exact(m, k, n, instructions, monkeypatch):
    if instructions and not MODULE._int8_instructions():
        pytest.skip("this CPU sums int8 products in 16 bits")
    monkeypatch.setattr(MODULE, "_int8_instructions", lambda: instructions)
    x, w = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    for a, b in ((x, w), (torch.full_like(x, 127), torch.full_like(w, -127)), (x.T.contiguous().T, w)):
        y = int8_matmul(a, b)
        assert y.dtype == torch.int32 and torch.equal(y.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("weight_format", WEIGHTS)
def test_folding_before_or_in_the_op_gives_the_same_bits(weight_format):
    qx, sx, qw, sw, aux, h, up, bias, spec = linear_args("linear_w4a8", SHAPES[0], "int8", weight_format)
    zeros, channel = (aux if weight_format == name else None for name in ("uint4", "nvfp4"))
    w8, s_ch = fold_int8(*unpack(qw, sw, spec.k, spec.fmt), spec.fmt, zeros, channel)
    folded = replace(spec, weight="int8", group=0)
    before = linear_w4a8(qx, sx, w8, s_ch, torch.empty(0), h, up, bias, folded)
    assert torch.equal(before, linear_w4a8(qx, sx, qw, sw, aux, h, up, bias, spec))


@pytest.mark.parametrize("weight_format", ["int4", "nvfp4"])
def test_scales_of_rows_that_are_given_are_not_looked_for(weight_format):
    qx, sx, qw, sw, aux, h, up, bias, spec = linear_args("linear_w4a8", SHAPES[0], "int8", weight_format)
    weight = (*unpack(qw, sw, spec.k, spec.fmt), spec.fmt, None, aux if weight_format == "nvfp4" else None)
    s_ch = fold_int8(*weight)[1] * 1.25
    w8, _ = fold_int8(*weight, s_ch)
    before = linear_w4a8(qx, sx, w8, s_ch, torch.empty(0), h, up, bias, replace(spec, weight="int8", group=0))
    given = linear_w4a8(qx, sx, qw, sw, torch.cat((s_ch, aux)), h, up, bias, replace(spec, row_scales=True))
    assert torch.equal(before, given)


def test_order_of_the_scales():
    """(sum·sx)·s_ch, each product rounded to fp32: what every backend does."""
    qx, sx, w8, s_ch, aux, h, up, bias, spec = linear_args(
        "linear_w4a8", (7, 300, 12, 0), "int8", dtype=torch.float32, folded=True)
    y = linear_w4a8(qx, sx, w8, s_ch, aux, h, up, torch.zeros_like(bias), spec)
    sums = (qx.long() @ w8.long().T).float()
    assert torch.equal(y, sums * sx[:, None] * s_ch)


def test_a_row_that_is_not_finite_gives_nan():
    args = linear_args("linear_w4a8", SHAPES[0], "int8")
    sx = args[1].clone()
    sx[2] = float("nan")
    y = linear_w4a8(args[0], sx, *args[2:])
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


NAMES = ("qx", "sx", "qw", "sw", "aux", "h", "up", "bias", "spec")


def wrong(folded=True, **changed):
    def call():
        args = dict(zip(NAMES, linear_args("linear_w4a8", SHAPES[0], "int8", folded=folded), strict=True))
        return linear_w4a8(*{**args, **changed}.values())

    return call


@pytest.mark.parametrize("call, sentence", [
    (wrong(qx=torch.zeros(6, 130, dtype=torch.int8)), r"qx: expected \(rows, in\) = \(6, 131\) int8, got \(6, 130\)"),
    (wrong(qx=torch.zeros(6, 131, dtype=torch.uint8)), "qx: expected .* int8, got .* uint8"),
    (wrong(sx=torch.zeros(6, 1)), r"sx: expected \(rows\) = \(6,\) float32, got \(6, 1\)"),
    (wrong(qw=torch.zeros(24, 66, dtype=torch.uint8)), r"qw: expected \(out, in\) = \(24, 131\) int8, got \(24, 66\)"),
    (wrong(sw=torch.zeros(24, 1)), r"sw: expected \(out\) = \(24,\) float32, got \(24, 1\)"),
    (wrong(False, qw=torch.zeros(24, 131, dtype=torch.int8)), r"qw: expected .* = \(24, 66\) uint8, got \(24, 131\)"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()


def test_4_bit_activations_are_refused():
    *args, spec = linear_args("linear_w4a8", SHAPES[0], "int8")
    with pytest.raises(NunchakuError, match="linear_w4a8: spec.act.format is 'int4', expected int8"):
        linear_w4a8(*args, replace(spec, act=ACTS["int4"]))
