"""The endings of the linear ops, on top of whichever linear: each against its formula in float64."""
from dataclasses import replace

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import OPS, quantize_act
from tests.ops.helpers import (
    ACTS,
    ACTS_OF,
    ENDINGS,
    SHAPES,
    assert_rounded,
    ending_args,
    linear_args,
    op_args,
    slow_linear,
)

ACTIVATIONS = {
    "none": lambda y: y,
    "silu": lambda y: y * torch.sigmoid(y),
    "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
    "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
}
FAMILIES = sorted(ACTS_OF)


def parts(family, ending, shape, **options):
    """(op, plain arguments, extra, spec with the ending's options, y and its size in float64)"""
    *args, spec = linear_args(family, shape, ACTS_OF[family][0])
    extra, wanted = ending_args(ending, shape)
    y, size = slow_linear(*args, spec)
    return OPS[family + ending], args, extra, replace(spec, **{**wanted, **options}), y, size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gelu_quantize(family, activation, shape):
    op, args, (inv_smooth, down), spec, y, size = parts(
        family, "_gelu_quantize", shape, activation=activation, next=ACTS["none"])
    z, _, h = op(*args, torch.ones_like(inv_smooth), down, spec)
    assert_rounded(z, ACTIVATIONS[activation](y), 2 * size + 1)
    assert torch.allclose(h.double(), z.double() @ down.double().T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_glu_quantize(activation, gate_first, shape):
    op, args, (inv_smooth, down), spec, y, size = parts(
        "linear_w4a8", "_glu_quantize", shape, activation=activation, gate_first=gate_first, next=ACTS["none"])
    z, _, _ = op(*args, torch.ones_like(inv_smooth), down, spec)
    value, gate = y.chunk(2, 1)[::-1] if gate_first else y.chunk(2, 1)
    large = (size.amax(1, keepdim=True) + 1).square() * 2
    assert_rounded(z, value * ACTIVATIONS[activation](gate), large)


@pytest.mark.parametrize("next_act", ACTS)
@pytest.mark.parametrize("ending", ["_gelu_quantize", "_glu_quantize"])
def test_quantizing_endings_are_quantize_act_of_the_rounded_value(ending, next_act):
    op, args, (inv_smooth, down), spec, _, _ = parts("linear_w4a4", ending, SHAPES[0], next=ACTS[next_act])
    z, _, _ = op(*args, torch.ones_like(inv_smooth), down, replace(spec, next=ACTS["none"]))
    fused, apart = op(*args, inv_smooth, down, spec), quantize_act(z, inv_smooth, down, ACTS[next_act])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(fused, apart, strict=True))


def norm_rotate(x, weight, rotary, dim, eps):
    """One row at a time, one head at a time."""
    out = torch.empty_like(x)
    for m, row in enumerate(x):
        angle = rotary[m % len(rotary)].double()
        for start in range(0, len(row), dim):
            head = row[start:start + dim]
            head = head / (head.square().mean() + eps).sqrt() * weight.double()
            turned = torch.view_as_complex(head.view(-1, 2).contiguous()) * torch.view_as_complex(angle)
            out[m, start:start + dim] = torch.view_as_real(turned).flatten()
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_qkv_rope(family, shape):
    op, args, (q_norm, k_norm, rotary), spec, y, size = parts(family, "_qkv_rope", shape, eps=1e-5)
    q, k, v = op(*args, q_norm, k_norm, rotary, spec)
    exact_q, exact_k, exact_v = y.chunk(3, 1)
    assert_rounded(v, exact_v, size.chunk(3, 1)[2])
    for got, exact, weight in ((q, exact_q, q_norm), (k, exact_k, k_norm)):
        # Two fp32 roundings of a head whose RMS is 1, times the sums' own error before it.
        slack = size.amax(1, keepdim=True) / exact.abs().amax(1, keepdim=True).clamp_min(1e-6) * 8 + 8
        expected = norm_rotate(exact, weight, rotary, spec.head_dim, spec.eps)
        assert_rounded(got, expected, slack.expand(expected.shape))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_residual(family, shape):
    op, args, (gate, residual), spec, y, size = parts(family, "_gate_residual", shape)
    rows = torch.arange(shape[0]) // max(shape[0] // len(gate), 1)
    gate_rows = gate.double()[rows]
    exact = residual.double() + gate_rows * y
    assert_rounded(op(*args, gate, residual, spec), exact, size * gate_rows.abs() + residual.double().abs())


def test_outputs_are_contiguous_and_apart():
    outputs = OPS["linear_w4a8_qkv_rope"](*op_args("linear_w4a8_qkv_rope"))
    assert all(t.is_contiguous() for t in outputs)
    assert len({t.untyped_storage().data_ptr() for t in outputs}) == 3


def wrong(ending, **changed):
    def call():
        op = OPS["linear_w4a8" + ending]
        args = dict(zip((p.name for p in op.parameters), op_args(op.name), strict=True))
        spec = {k.removeprefix("spec_"): v for k, v in changed.items() if k.startswith("spec_")}
        args |= {k: v for k, v in changed.items() if not k.startswith("spec_")}
        return op(*{**args, "spec": replace(args["spec"], **spec)}.values())

    return call


BF16 = torch.zeros(1).bfloat16()


@pytest.mark.parametrize("call, sentence", [
    (wrong("_gelu_quantize", spec_next=None), "spec.next: expected how the next linear's input is quantized"),
    (wrong("_gelu_quantize", next_down=BF16), "next_down: expected a matrix"),
    (wrong("_gelu_quantize", next_down=BF16.expand(2, 23)), r"next_down: expected .* = \(2, 24\) bfloat16"),
    (wrong("_gelu_quantize", next_inv_smooth=torch.ones(12)), r"next_inv_smooth: expected \(in\) = \(24,\) float32"),
    (wrong("_glu_quantize", next_inv_smooth=torch.ones(24)), r"next_inv_smooth: expected \(in\) = \(12,\) float32"),
    (wrong("_glu_quantize", qw=torch.zeros(23, 66, dtype=torch.uint8)), "qw: expected an even number .* got 23"),
    (wrong("_qkv_rope", spec_head_dim=0), "spec.head_dim: expected an even number, got 0"),
    (wrong("_qkv_rope", spec_head_dim=3), "spec.head_dim: expected an even number, got 3"),
    (wrong("_qkv_rope", spec_head_dim=6), "qw: expected output channels for q, k and v in heads of 6, got 24"),
    (wrong("_qkv_rope", q_norm=BF16), r"q_norm: expected \(head dim\) = \(4,\)"),
    (wrong("_qkv_rope", k_norm=BF16), r"k_norm: expected \(head dim\) = \(4,\)"),
    (wrong("_qkv_rope", rotary=torch.zeros(4, 2, 2)), "rotary: expected tokens that divide the 6 rows, got 4"),
    (wrong("_qkv_rope", rotary=torch.zeros(3, 4, 2)), r"rotary: expected .* = \(3, 2, 2\) float32"),
    (wrong("_gate_residual", gate=BF16), "gate: expected a matrix"),
    (wrong("_gate_residual", gate=BF16.expand(4, 24)), "gate: expected samples that divide the 6 rows, got 4"),
    (wrong("_gate_residual", gate=BF16.expand(2, 23)), r"gate: expected \(samples, out\) = \(2, 24\)"),
    (wrong("_gate_residual", residual=torch.zeros(6, 24)), "residual: expected .* bfloat16, got .* float32"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()


def test_there_is_one_op_for_every_linear_and_ending():
    assert {family + ending for family in ACTS_OF for ending in ENDINGS} <= set(OPS)
