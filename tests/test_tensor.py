"""QTensor: what it stores, how near it comes, and what it refuses."""
from dataclasses import replace

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import INT4, INT8, NVFP4, UINT4, Format, fold_int8, group_count, unpack_nibbles
from nunchaku_py.tensor import QTensor, fake_quantize

FORMATS = [INT4, UINT4, NVFP4, Format("int4", 5)]
SHAPES = [(1, 1), (3, 64), (9, 131), (40, 200), (0, 64), (3, 0)]


def squared_error(w, fmt, **options):
    return (QTensor.quantize(w, fmt, **options).dequantize() - w).square()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_shapes_and_dtypes(fmt, shape, search):
    q = QTensor.quantize(torch.randn(shape), fmt, torch.float16, search)
    (n, k), scales = shape, torch.float8_e4m3fn if fmt.name == "nvfp4" else torch.float16
    groups = group_count(k, fmt.group)
    assert q.shape == shape and q.codes.shape == (n, -(-k // 2)) and q.codes.dtype == torch.uint8
    assert q.scales.shape == (n, groups) and q.scales.dtype == scales
    assert (q.zeros is not None) == (fmt.name == "uint4") and (q.channel_scale is not None) == (fmt.name == "nvfp4")
    assert q.dequantize().shape == shape and q.unpacked().shape == shape
    assert q.nbytes == sum(t.numel() * t.element_size() for t in q.tensors().values())


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_weight_is_within_half_a_step(fmt, search):
    w = torch.randn(20, 150)
    q = QTensor.quantize(w, fmt, search=search)
    scale = q.scales.float() * (1 if q.channel_scale is None else q.channel_scale[:, None])
    step = scale.repeat_interleave(fmt.group, 1)[:, :150]
    widest = 1.0 if fmt.name == "nvfp4" else 0.5  # e2m1: half of the step from 4 to 6
    outside = (q.dequantize() - w).abs() > step * widest + 1e-6
    # A scale rounded down, or shrunk by the search, clips the largest weight of a group.
    at_the_end = (q.unpacked().abs() == fmt.top) | (q.unpacked() == 0) | ((q.unpacked() & 7) == 7)
    assert not (outside & ~at_the_end).any()
    if not search:
        assert (outside.float().mean() < 0.02) and ((q.dequantize() - w).abs() <= step * (widest + 0.51)).all()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_fake_quantize_gives_the_dequantized_weight(fmt, shape, search):
    w = torch.randn(shape) * 0.02
    w[:1] = 0
    expected = QTensor.quantize(w, fmt, search=search).dequantize()
    assert torch.equal(fake_quantize(w, fmt, search=search), expected)
    assert fake_quantize(w, fmt, search=search, out=w) is w and torch.equal(w, expected)


@pytest.mark.parametrize("distribution", [
    torch.distributions.Normal(0.0, 0.02),
    torch.distributions.StudentT(3.0, 0.0, 0.02),
    torch.distributions.Laplace(0.0, 0.02),
], ids=["gaussian", "student-t", "laplace"])
@pytest.mark.parametrize("fmt, gain", [(INT4, 0.95), (NVFP4, 0.9), (UINT4, 0.97)], ids=str)
def test_search_is_nearer_in_sum_and_never_farther_in_a_group(fmt, gain, distribution):
    w = distribution.sample((64, 1024))
    plain, searched = squared_error(w, fmt, search=False), squared_error(w, fmt, search=True)
    assert searched.sum() < gain * plain.sum()
    by_group = (64, 1024 // fmt.group, fmt.group)
    assert (searched.view(by_group).sum(-1) <= plain.view(by_group).sum(-1) * (1 + 1e-5) + 1e-12).all()


def test_nvfp4_search_beats_absmax_over_6_and_over_4():
    w = torch.randn(32, 512)
    q = QTensor.quantize(w, NVFP4)
    x = (w / q.channel_scale[:, None]).view(32, 32, 16)
    best = ((q.dequantize() - w) / q.channel_scale[:, None]).square().view(32, 32, 16).sum(-1)
    for divisor in (6, 4):
        scale = (x.abs().amax(-1, keepdim=True) / divisor).to(torch.float8_e4m3fn).float()
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = grid[((x / scale).abs()[..., None] - grid).abs().argmin(-1)] * x.sign() * scale
        assert (best <= (nearest - x).square().sum(-1) * (1 + 1e-5)).all()


def test_channel_scale_is_what_bf16_holds_and_leaves_room():
    w = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    w[7] = 0
    q = QTensor.quantize(w, NVFP4)
    assert torch.equal(q.channel_scale, q.channel_scale.bfloat16().float()) and (q.channel_scale > 0).all()
    assert q.scales.float().isfinite().all() and not q.dequantize()[7].any()
    kept = torch.arange(50) != 7
    relative = (q.dequantize() - w)[kept].double().norm(dim=1) / w[kept].double().norm(dim=1)
    assert (relative < 0.12).all()


def test_int4_scale_is_absmax_over_7_and_rows_are_independent():
    w = torch.randn(3000, 130)
    q = QTensor.quantize(w, INT4, search=False)
    assert torch.equal(q.scales[:, 2], (w[:, 128:].abs().amax(1) / 7).bfloat16())
    one = QTensor.quantize(w[2999:], INT4, search=False)
    assert torch.equal(one.codes, q.codes[2999:]) and torch.equal(one.scales, q.scales[2999:])


def test_uint4_spans_its_group():
    w = torch.rand(4, 64) + 3
    q = QTensor.quantize(w, UINT4, search=False)
    assert torch.equal(q.zeros[:, 0], w.amin(1).bfloat16())
    assert ((q.dequantize() - w).abs() <= q.scales.float() * 0.6 + 0.01).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_unpacked_and_fold(fmt):
    q = QTensor.quantize(torch.randn(9, 131), fmt)
    assert torch.equal(q.unpacked(), unpack_nibbles(q.codes, 131, signed=fmt.name == "int4"))
    if fmt.name == "int4":
        assert q.unpacked().min() >= -7
    w8, s_ch = q.fold_int8()
    expected = fold_int8(q.unpacked(), q.scales, fmt, q.zeros, q.channel_scale)
    assert torch.equal(w8, expected[0]) and torch.equal(s_ch, expected[1])
    off, largest = (w8 * s_ch[:, None] - q.dequantize()).abs() / s_ch[:, None], w8.abs() == 127
    assert (off <= 0.5001).logical_or(largest & (fmt.name == "nvfp4")).all()


def test_input_is_left_alone_and_may_be_16_bit_or_strided():
    w = torch.randn(130, 9).bfloat16().T
    kept = w.clone()
    q = QTensor.quantize(w, NVFP4)
    assert torch.equal(w, kept)
    assert torch.equal(q.codes, QTensor.quantize(w.float().contiguous(), NVFP4).codes)


def test_same_input_same_bits():
    w = torch.randn(300, 1000)
    a, b = QTensor.quantize(w, NVFP4), QTensor.quantize(w.clone(), NVFP4)
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8))
               for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


def test_to_moves_every_tensor():
    q = QTensor.quantize(torch.randn(4, 64), NVFP4).to("meta")
    assert all(t.is_meta for t in q.tensors().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", [QTensor.quantize, fake_quantize])
def test_what_is_not_finite_is_refused(quantize, bad):
    w = torch.randn(5000, 64)
    w[4321, 5] = bad
    with pytest.raises(NunchakuError, match=r"row 4321 of \(5000, 64\) holds NaN or an infinity"):
        quantize(w, INT4)


def fields(fmt=NVFP4, **changed):
    return replace(QTensor.quantize(torch.randn(4, 130), fmt), **changed)


@pytest.mark.parametrize("make, sentence", [
    (lambda: QTensor.quantize(torch.zeros(2, 2), INT8), "expected a 4-bit format, got int8"),
    (lambda: fields(format=INT8), "holds 4-bit formats, got int8"),
    (lambda: fields(codes=torch.zeros(4, 66, dtype=torch.uint8)), r"codes: .* = \(4, 65\) torch.uint8, got \(4, 66\)"),
    (lambda: fields(codes=torch.zeros(4, 65, dtype=torch.int8)), r"codes: .*uint8, got \(4, 65\) torch.int8"),
    (lambda: fields(scales=torch.zeros(4, 9)), r"scales: .* = \(4, 9\) torch.float8_e4m3fn, got .*float32"),
    (lambda: fields(scales=torch.zeros(9, 4)), r"scales: expected \(out, groups\) = \(4, 9\)"),
    (lambda: fields(channel_scale=None), r"channel_scale: expected \(out\) = \(4,\) torch.float32, got nothing"),
    (lambda: fields(zeros=torch.zeros(4, 9)), "zeros: this format has none"),
    (lambda: fields(UINT4, zeros=None), r"zeros: expected \(out, groups\) = \(4, 3\) 16 bit, got nothing"),
    (lambda: fields(INT4, channel_scale=torch.ones(4)), "channel_scale: this format has none"),
])
def test_wrong_tensors_are_refused(make, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        make()
