"""quantize_act against its formula, format by format."""
from dataclasses import replace

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import decode, group_count
from nunchaku_py.ops import ActSpec, quantize_act
from nunchaku_py.ops.quantize_act import unpack
from tests.ops.helpers import ACTS, HALF_STEP, SHAPES, activation, op_args

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 0, 2)])
@pytest.mark.parametrize("name", ACTS)
def test_shapes_codes_and_h(name, shape, dtype):
    (m, k, _, rank), spec = shape, ACTS[name]
    x, inv_smooth, down = activation(m, k, rank, spec, dtype)
    qx, sx, h = quantize_act(x, inv_smooth, down, spec)
    exact = x.double() @ down.double().T
    assert h.dtype == torch.float32 and torch.allclose(h.double(), exact, rtol=1e-5, atol=1e-5)
    xhat = (x.float() + spec.shift) * inv_smooth
    if name == "none":
        assert torch.equal(qx, xhat.to(dtype)) and qx.dtype == dtype and sx.shape == (0,)
        return
    packed = name != "int8"
    assert qx.shape == (m, -(-k // 2) if packed else k) and qx.dtype == (torch.uint8 if packed else torch.int8)
    assert sx.shape == ((m, group_count(k, spec.group)) if packed else (m,))
    assert sx.dtype == {"nvfp4": torch.float8_e4m3fn, "int8": torch.float32}.get(name, dtype)
    values = decode(*unpack(qx, sx, k, spec.fmt), spec.fmt)
    scale = sx.float().view(m, group_count(k, spec.group)).repeat_interleave(spec.group or max(k, 1), 1)[:, :k]
    # Half a step, and where the stored scale was rounded down, what that clips off the largest value.
    clipped = {"nvfp4": 6 * 2**-4, "int8": 0}.get(name, 15 * HALF_STEP[dtype])
    widest = 1.0 if name == "nvfp4" else 0.5
    assert ((values - xhat).abs() <= scale * (widest + clipped) * 1.001).all()


def test_golden_bytes():
    x = torch.tensor([[7.0, -3.0, 1.0], [0.0, 0.0, 0.0]]).bfloat16()
    none = torch.empty(0, 3).bfloat16()
    qx, sx, h = quantize_act(x, torch.ones(3), none, ActSpec("int4", 64))
    assert qx.tolist() == [[0xD7, 0x01], [0, 0]] and sx.tolist() == [[1.0], [0.0]] and h.shape == (2, 0)
    qx, sx, _ = quantize_act(x.clamp_min(-2), torch.tensor([1.0, 1.0, 4.0]), none, ActSpec("uint4", 64, shift=8.0))
    assert sx.tolist() == [[2.40625], [2.140625]]  # bf16(36/15), bf16(32/15)
    assert qx.tolist() == [[0x26, 0x0F], [0x44, 0x0F]]
    qx, sx, _ = quantize_act(x - 1, torch.ones(3), none, ActSpec("nvfp4", 16))
    assert qx.tolist() == [[0xE7, 0x00], [0xFF, 0x0F]] and sx[0].float().item() == 1.0
    qx, sx, _ = quantize_act(x, torch.ones(3), none, ActSpec("int8"))
    assert qx.tolist() == [[127, -54, 18], [0, 0, 0]] and sx[1] == 0


def test_h_reads_the_raw_x():
    x, inv_smooth, down = activation(4, 70, 3, ACTS["uint4"], torch.float32)
    _, _, h = quantize_act(x, inv_smooth, down, ACTS["uint4"])
    assert torch.equal(h, quantize_act(x, inv_smooth * 3, down, ACTS["int4"])[2])


@pytest.mark.parametrize("name", ACTS)
def test_strided_inputs(name):
    x, inv_smooth, down = activation(5, 131, 4, ACTS[name], torch.bfloat16)
    strided = quantize_act(x.T.contiguous().T, inv_smooth, down.T.contiguous().T, ACTS[name])
    plain = quantize_act(x, inv_smooth, down, ACTS[name])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(strided[:2], plain[:2], strict=True))
    assert all(t.is_contiguous() for t in strided)


@pytest.mark.parametrize("name", ACTS)
def test_the_input_is_neither_changed_nor_returned(name):
    x = torch.randn(3, 64)
    kept = x.clone()
    outputs = quantize_act(x, torch.ones(64), torch.randn(2, 64), ACTS[name])
    assert torch.equal(x, kept) and all(t.data_ptr() != x.data_ptr() for t in outputs)


def wrong(**changed):
    x, inv_smooth, down, spec = op_args("quantize_act")
    args = {"x": x, "inv_smooth": inv_smooth, "down": down, "spec": spec} | changed
    return lambda: quantize_act(*args.values())


@pytest.mark.parametrize("call, sentence", [
    (wrong(x=torch.zeros(2, 3, 131).bfloat16()), r"x: expected a matrix \(rows, in\), got \(2, 3, 131\)"),
    (wrong(x=torch.zeros(6, 131).double()), "x: expected .* bfloat16 or float16 or float32, got .* float64"),
    (wrong(inv_smooth=torch.ones(130)), r"inv_smooth: expected \(in\) = \(131,\) float32, got \(130,\) float32"),
    (wrong(inv_smooth=torch.ones(131).half()), r"inv_smooth: expected .* float32, got \(131,\) float16"),
    (wrong(down=torch.ones(5, 130).bfloat16()), r"down: expected \(rank, in\) = \(5, 131\) bfloat16, got \(5, 130\)"),
    (wrong(down=torch.ones(5, 131)), "down: expected .* bfloat16, got .* float32"),
    (wrong(down=torch.ones(5, 131, device="meta").bfloat16()), "down: expected it on cpu .* got meta"),
    (wrong(spec=replace(ACTS["int4"], norm="rms")), "spec.norm is 'rms', which norm_modulate_quantize applies"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()
