"""norm_modulate_quantize against the unfused way, and the unfused way against its formula."""
from dataclasses import replace

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import norm_modulate_quantize, quantize_act
from tests.ops.helpers import ACTS, HALF_STEP, SHAPES, op_args


def modulated(x, norm_weight, scale, shift, spec):
    """norm(x)·norm_weight·(1 + scale) + shift in float64."""
    x = x.double()
    if spec.norm == "layer":
        x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + spec.eps).sqrt() * norm_weight.double()
    rows = torch.arange(len(x)) // max(len(x) // len(scale), 1)
    return x * (1 + scale.double()[rows]) + shift.double()[rows]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_and_the_modulation(shape, dtype, norm):
    *args, spec = op_args("norm_modulate_quantize", shape, dtype, act="none")
    x, norm_weight, scale, shift, _, down = args
    ones = torch.ones(x.shape[1])
    value, _, h = norm_modulate_quantize(x, norm_weight, scale, shift, ones, down, replace(spec, norm=norm))
    exact = modulated(x, norm_weight, scale, shift, replace(spec, norm=norm))
    assert ((value.double() - exact).abs() <= exact.abs() * HALF_STEP[dtype] * 1.01 + 2e-5).all()
    assert torch.allclose(h.double(), value.double() @ down.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", ACTS)
def test_it_is_quantize_act_of_the_rounded_value(act):
    x, norm_weight, scale, shift, inv_smooth, down, spec = op_args("norm_modulate_quantize", act=act)
    keep = replace(ACTS["none"], norm="layer")
    value, _, _ = norm_modulate_quantize(x, norm_weight, scale, shift, torch.ones(131), down, keep)
    fused = norm_modulate_quantize(x, norm_weight, scale, shift, inv_smooth, down, spec)
    apart = quantize_act(value, inv_smooth, down, replace(spec, norm="none"))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(fused, apart, strict=True))


NAMES = ("x", "norm_weight", "scale", "shift", "inv_smooth", "down", "spec")


def wrong(**changed):
    args = dict(zip(NAMES, op_args("norm_modulate_quantize"), strict=True)) | changed
    return lambda: norm_modulate_quantize(*args.values())


@pytest.mark.parametrize("call, sentence", [
    (wrong(x=torch.zeros(131)), "x: expected a matrix"),
    (wrong(x=torch.zeros(6, 131, dtype=torch.int8)), "x: expected .* got .* int8"),
    (wrong(scale=torch.zeros(131)), "scale: expected a matrix"),
    (wrong(scale=torch.zeros(4, 131)), "scale: expected samples that divide the 6 rows, got 4"),
    (wrong(scale=torch.zeros(0, 131)), "scale: expected samples that divide the 6 rows, got 0"),
    (wrong(shift=torch.zeros(1, 131)), r"shift: expected \(samples, in\) = \(2, 131\)"),
    (wrong(norm_weight=torch.zeros(3)), r"norm_weight: expected \(in\) = \(131,\)"),
    (wrong(inv_smooth=torch.zeros(3)), r"inv_smooth: expected \(in\) = \(131,\)"),
    (wrong(down=torch.zeros(3, 131)), "down: expected .* bfloat16"),
    (wrong(spec=ACTS["int4"]), "spec.norm is 'none', expected 'layer' or 'rms'"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()
