"""linear_w4a4 against integer sums group by group, and the checks that all linear ops share."""
from dataclasses import replace

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import INT4
from nunchaku_py.ops import LinearSpec, linear_w4a4, quantize_act
from nunchaku_py.ops.quantize_act import unpack
from nunchaku_py.tensor import QTensor
from tests.ops.helpers import ACTS, SHAPES, WEIGHTS, assert_rounded, linear_args, slow_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_format", WEIGHTS)
@pytest.mark.parametrize("act", ["int4", "uint4", "nvfp4"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 65, 7, 2), (2, 1, 1, 0), (2, 0, 3, 1)])
def test_formula(shape, act, weight_format, dtype):
    args = linear_args("linear_w4a4", shape, act, weight_format, dtype)
    y = linear_w4a4(*args)
    assert y.dtype == dtype
    assert_rounded(y, *slow_linear(*args))


@pytest.mark.parametrize("act", ["int4", "uint4"])
def test_it_is_the_sum_of_integer_sums(act):
    m, k, n, rank = 5, 131, 7, 3
    qx, sx, qw, sw, aux, h, up, bias, spec = linear_args("linear_w4a4", (m, k, n, rank), act, dtype=torch.float16)
    x, w = unpack(qx, sx, k, spec.act.fmt)[0].long(), unpack(qw, sw, k, spec.fmt)[0].long()
    y = h.double() @ up.double().T + bias.double()
    for g, start in enumerate(range(0, k, 64)):
        sums = x[:, start:start + 64] @ w[:, start:start + 64].T
        y += sums.double() * sx[:, g:g + 1].double() * sw[:, g].double()
    assert_rounded(linear_w4a4(qx, sx, qw, sw, aux, h, up, bias, spec), y, slow_linear(
        qx, sx, qw, sw, aux, h, up, bias, spec)[1])


def test_it_approximates_the_16_bit_linear():
    x, w = torch.randn(32, 512).bfloat16(), torch.randn(64, 512)
    q, none = QTensor.quantize(w, INT4), torch.empty(0)
    qx, sx, h = quantize_act(x, torch.ones(512), torch.empty(0, 512).bfloat16(), ACTS["int4"])
    spec = LinearSpec("int4", 64, 512, ACTS["int4"])
    y = linear_w4a4(qx, sx, q.codes, q.scales, none, h, torch.empty(64, 0).bfloat16(), torch.zeros(64).bfloat16(), spec)
    exact = x.double() @ w.double().T
    assert (y.double() - exact).norm() / exact.norm() < 0.2


def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others():
    args = linear_args("linear_w4a4", SHAPES[0])
    sx = args[1].clone()
    sx[2, 1] = float("nan")
    y, plain = linear_w4a4(args[0], sx, *args[2:]), linear_w4a4(*args)
    kept = torch.arange(6) != 2
    assert y[2].isnan().all() and torch.equal(y[kept], plain[kept])


def test_strided_arguments():
    args = linear_args("linear_w4a4", SHAPES[0], "nvfp4", "nvfp4")
    strided = [a.T.contiguous().T if isinstance(a, torch.Tensor) and a.ndim == 2 else a for a in args]
    assert torch.allclose(linear_w4a4(*strided).float(), linear_w4a4(*args).float(), rtol=2**-7)


def test_many_rows_of_w_are_decoded_in_stretches(monkeypatch):
    args = linear_args("linear_w4a4", (5, 131, 40, 3), "nvfp4", "nvfp4")
    whole = linear_w4a4(*args)
    monkeypatch.setattr("nunchaku_py.ops.linear.DECODED", 1000)
    assert torch.allclose(linear_w4a4(*args).float(), whole.float(), rtol=2**-7)


NAMES = ("qx", "sx", "qw", "sw", "aux", "h", "up", "bias", "spec")


def wrong(act="int4", weight_format="int4", **changed):
    def call():
        args = dict(zip(NAMES, linear_args("linear_w4a4", SHAPES[0], act, weight_format), strict=True))
        spec = {k: changed.pop(k) for k in ("act", "weight") if k in changed}
        return linear_w4a4(*{**args, **changed, "spec": replace(args["spec"], **spec)}.values())

    return call


BYTES = torch.zeros(1, 1, dtype=torch.uint8)
BF16 = torch.zeros(1, 1).bfloat16()


@pytest.mark.parametrize("call, sentence", [
    (wrong(qx=torch.zeros(6, dtype=torch.uint8)), "qx: expected a matrix"),
    (wrong(qw=torch.zeros(6, dtype=torch.uint8)), "qw: expected a matrix"),
    (wrong(qx=BYTES.expand(6, 131)), r"qx: expected \(rows, ceil\(in/2\)\) = \(6, 66\) uint8, got \(6, 131\) uint8"),
    (wrong(qx=BYTES.expand(6, 66).to(torch.int8)), "qx: expected .* uint8, got .* int8"),
    (wrong(sx=BF16.expand(6, 2)), r"sx: expected \(rows, groups\) = \(6, 3\)"),
    (wrong("nvfp4", "nvfp4", sx=BF16.expand(6, 9)), "sx: expected .* float8_e4m3fn, got .* bfloat16"),
    (wrong(qw=BYTES.expand(24, 65)), r"qw: expected \(out, ceil\(in/2\)\) = \(24, 66\) uint8, got \(24, 65\)"),
    (wrong(sw=BF16.expand(24, 4)), r"sw: expected \(out, groups\) = \(24, 3\)"),
    (wrong("nvfp4", "nvfp4", sw=BF16.expand(24, 9)), "sw: expected .* float8_e4m3fn"),
    (wrong(aux=torch.ones(24)), r"aux: expected \(none\) = \(0,\), got \(24,\)"),
    (wrong("nvfp4", "nvfp4", aux=torch.empty(0)), r"aux: expected channel_scale \(out\) = \(24,\) float32, got \(0,\)"),
    (wrong("int4", "uint4", aux=torch.empty(0)), r"aux: expected zeros \(out, groups\) = \(24, 3\)"),
    (wrong(h=torch.zeros(6, 4)), r"h: expected \(rows, rank\) = \(6, 5\) float32"),
    (wrong(h=BF16.expand(6, 5)), "h: expected .* float32, got .* bfloat16"),
    (wrong(up=BF16.expand(23, 5)), r"up: expected \(out, rank\) = \(24, 5\)"),
    (wrong(bias=torch.zeros(1)), r"bias: expected \(out\) = \(24,\)"),
    (wrong(bias=torch.zeros(24, device="meta")), "bias: expected it on cpu as the other arguments, got meta"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()


@pytest.mark.parametrize("changed, sentence", [
    ({"act": ACTS["int8"]}, "linear_w4a4: spec.act.format is 'int8', expected int4 or uint4 or nvfp4"),
    ({"weight": "int8", "group": 0}, "linear_w4a4: spec.weight is 'int8', expected int4 or uint4 or nvfp4"),
])
def test_wrong_specs(changed, sentence):
    *args, spec = linear_args("linear_w4a4", SHAPES[0])
    with pytest.raises(NunchakuError, match=sentence):
        linear_w4a4(*args, replace(spec, **changed))
