"""linear_w4a16 against the decoded weight, rounded to 16 bit, in float64."""
from dataclasses import replace

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import linear_w4a16
from tests.ops.helpers import ACTS, SHAPES, WEIGHTS, assert_rounded, linear_args, slow_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_format", WEIGHTS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 65, 7, 2), (2, 1, 1, 0), (2, 0, 3, 1)])
def test_formula(shape, weight_format, dtype):
    args = linear_args("linear_w4a16", shape, "none", weight_format, dtype)
    y = linear_w4a16(*args)
    assert y.dtype == dtype
    assert_rounded(y, *slow_linear(*args))


def test_folded_weights_may_be_decoded_too():
    args = linear_args("linear_w4a16", SHAPES[0], "none", dtype=torch.float16, folded=True)
    qx, _, w8, s_ch, _, h, up, bias, _ = args
    w = (w8.float() * s_ch[:, None]).half().double()
    exact = qx.double() @ w.T + h.double() @ up.double().T + bias.double()
    size = qx.double().abs() @ w.abs().T + h.double().abs() @ up.double().abs().T + bias.double().abs()
    assert_rounded(linear_w4a16(*args), exact, size)


NAMES = ("qx", "sx", "qw", "sw", "aux", "h", "up", "bias", "spec")


def wrong(**changed):
    args = dict(zip(NAMES, linear_args("linear_w4a16", SHAPES[0], "none"), strict=True)) | changed
    return lambda: linear_w4a16(*args.values())


@pytest.mark.parametrize("call, sentence", [
    (wrong(qx=torch.zeros(6, 130).bfloat16()), r"qx: expected \(rows, in\) = \(6, 131\) bfloat16, got \(6, 130\)"),
    (wrong(qx=torch.zeros(6, 131).half()), "qx: expected .* bfloat16, got .* float16"),
    (wrong(sx=torch.zeros(6)), r"sx: expected \(none\) = \(0,\), got \(6,\)"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()


def test_quantized_activations_are_refused():
    *args, spec = linear_args("linear_w4a16", SHAPES[0], "none")
    with pytest.raises(NunchakuError, match="linear_w4a16: spec.act.format is 'int8', expected none"):
        linear_w4a16(*args, replace(spec, act=ACTS["int8"]))
