"""Formats against rounding written out number by number, on shapes that divide nothing."""
import math

import numpy as np
import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import (
    INT4,
    INT8,
    NVFP4,
    UINT4,
    Format,
    decode,
    encode,
    fold_int8,
    format_of,
    group_count,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FORMATS = [INT4, UINT4, NVFP4, INT8, Format("int4", 5), Format("nvfp4", 3), Format("uint4", 1000)]
SHAPES = [(0, 64), (1, 1), (3, 16), (2, 65), (5, 131), (7, 200), (2, 0)]


def nearest_e2m1(value):
    """The code of the nearest number, ties to the even code, sign kept."""
    magnitude = min(abs(value), 6.0)
    code = min(range(8), key=lambda c: (abs(E2M1[c] - magnitude), c % 2))
    return code + (8 if math.copysign(1, value) < 0 else 0)


def slow_scale(values, fmt, dtype):
    """One group's stored scale."""
    top = max([np.float32(0)] + [np.float32(v if fmt.name == "uint4" else abs(v)) for v in values])
    scale = np.float32(top) / np.float32(fmt.top)
    return torch.tensor(min(float(scale), torch.finfo(dtype).max)).to(dtype)


def slow_code(value, scale, fmt):
    if scale == 0:
        return 0
    ratio = float(np.float32(value) / np.float32(scale))
    if fmt.name == "nvfp4":
        return nearest_e2m1(ratio)
    low, high = {"int4": (-7, 7), "uint4": (0, 15), "int8": (-127, 127)}[fmt.name]
    return max(low, min(high, round(ratio)))  # Python rounds half to even


def slow_value(code, fmt):
    if fmt.name != "nvfp4":
        return float(code)
    return E2M1[code & 7] * (-1 if code & 8 else 1)


def groups(row, group):
    step = group or max(len(row), 1)
    return [row[i:i + step] for i in range(0, len(row), step)] or [[]] * (group == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantize_rows_follows_the_rule(fmt, shape, dtype):
    x = torch.randn(shape) * torch.rand(shape[0], 1).mul(6).sub(3).exp()
    codes, scales = quantize_rows(x, fmt, dtype)
    assert codes.shape == shape and codes.dtype == torch.int8
    assert scales.shape == (shape[0], group_count(shape[1], fmt.group)) and scales.dtype == fmt.scale_dtype(dtype)
    for row, row_codes, row_scales in zip(x.tolist(), codes.tolist(), scales, strict=True):
        expected = [slow_scale(part, fmt, scales.dtype) for part in groups(row, fmt.group)]
        assert [float(s) for s in row_scales] == [float(s) for s in expected]
        parts = zip(groups(row, fmt.group), expected, strict=True)
        assert row_codes == [slow_code(v, float(s), fmt) for part, s in parts for v in part]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_code_times_scale(fmt, shape):
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "nvfp4": (0, 16), "int8": (-127, 128)}[fmt.name]
    codes = torch.randint(low, high, shape, dtype=torch.int8)
    scales = torch.rand(shape[0], group_count(shape[1], fmt.group)).to(fmt.scale_dtype(torch.bfloat16))
    zeros = torch.randn(scales.shape).bfloat16()
    channel = torch.rand(shape[0])
    values = torch.tensor([[slow_value(c, fmt) for c in row] for row in codes.tolist()]).reshape(shape)
    step = fmt.group or max(shape[1], 1)
    spread = scales.float().repeat_interleave(step, 1)[:, :shape[1]]
    assert torch.equal(decode(codes, scales, fmt), values * spread)
    shifted = values * spread + zeros.float().repeat_interleave(step, 1)[:, :shape[1]]
    assert torch.equal(decode(codes, scales, fmt, zeros), shifted)
    assert torch.equal(decode(codes, scales, fmt, zeros, channel), shifted * channel[:, None])


def test_e2m1_rounds_half_to_even_everywhere():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    points = torch.cat([torch.tensor(E2M1), ties, torch.rand(500) * 7, torch.tensor([1e-30, 1e-40, 6.5, 1e30])])
    points = torch.cat([points, torch.nextafter(points, torch.tensor(0.0)), torch.nextafter(points, torch.tensor(9.0))])
    points = torch.cat([points, -points])[None]
    ones = torch.ones(1, 1).to(torch.float8_e4m3fn)
    codes = encode(points, ones, Format("nvfp4", 0))
    assert codes.tolist() == [[nearest_e2m1(v) for v in points[0].tolist()]]


def test_e4m3_scales_round_to_nearest_and_saturate():
    x = 6 * torch.tensor([[1.0625], [1.1875], [448], [1e6], [2**-9], [2**-10], [2**-11]])
    codes, scales = quantize_rows(x, NVFP4, torch.bfloat16)
    assert scales.float().flatten().tolist() == [1.0, 1.25, 448.0, 448.0, 2**-9, 0.0, 0.0]
    assert codes.flatten().tolist() == [7, 7, 7, 7, 7, 0, 0]  # the fifth is 6.0, what underflows is 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zero_groups_have_zero_scales_and_codes(fmt):
    x = torch.randn(4, 130).abs()
    x[1] = 0
    x[2] = -0.0
    codes, scales = quantize_rows(x, fmt, torch.float16)
    assert not codes[1:3].any() and not scales[1:3].float().any()
    assert scales[0].float().all()


def test_a_scale_that_underflows_in_its_type_gives_zero_codes():
    x = torch.full((1, 64), -1e-8)
    codes, scales = quantize_rows(x, INT4, torch.float16)
    assert not codes.any() and not scales.any()
    codes, scales = quantize_rows(x, INT4, torch.bfloat16)
    assert (codes == -7).all() and scales.all()


def test_a_scale_too_large_for_fp16_saturates():
    codes, scales = quantize_rows(torch.tensor([[1e6, -3e5]]), INT4, torch.float16)
    assert scales.tolist() == [[65504.0]] and codes.tolist() == [[7, -5]]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(fmt, bad):
    x = torch.randn(3, 70).abs()
    x[1, 66] = bad
    codes, scales = quantize_rows(x, fmt, torch.bfloat16)
    values = decode(codes, scales, fmt)
    assert values[1, 66].isnan()
    assert values[[0, 2]].isfinite().all()
    assert torch.equal(codes[[0, 2]], quantize_rows(x[[0, 2]], fmt, torch.bfloat16)[0])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_non_contiguous_and_16_bit_inputs(fmt):
    x = torch.randn(90, 6).bfloat16().T
    codes, scales = quantize_rows(x, fmt, torch.bfloat16)
    expected_codes, expected_scales = quantize_rows(x.float().contiguous(), fmt, torch.bfloat16)
    assert torch.equal(codes, expected_codes) and torch.equal(scales.float(), expected_scales.float())
    assert torch.equal(decode(codes.T.contiguous().T, scales, fmt), decode(codes, scales, fmt))


def test_rows_do_not_depend_on_their_neighbours():
    x = torch.randn(3000, 130)
    codes, scales = quantize_rows(x, NVFP4, torch.bfloat16)
    part_codes, part_scales = quantize_rows(x[2500:2501], NVFP4, torch.bfloat16)
    assert torch.equal(codes[2500:2501], part_codes) and torch.equal(scales[2500:2501].float(), part_scales.float())


@pytest.mark.parametrize("fmt", [INT4, UINT4, Format("int4", 7)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_fold_int8_is_the_decoded_row_in_127_steps(fmt, shape):
    codes, scales = quantize_rows(torch.randn(shape), fmt, torch.bfloat16)
    zeros = torch.randn(scales.shape).bfloat16() if fmt.name == "uint4" else None
    w8, s_ch = fold_int8(codes, scales, fmt, zeros)
    assert w8.shape == shape and w8.dtype == torch.int8 and s_ch.shape == (shape[0],) and s_ch.dtype == torch.float32
    w = decode(codes, scales, fmt, zeros)
    for row, row8, scale in zip(w.tolist(), w8.tolist(), s_ch.tolist(), strict=True):
        expected = float(np.float32(max([0.0] + [abs(v) for v in row])) / np.float32(127))
        assert scale == expected
        assert row8 == [slow_code(v, scale, INT8) for v in row]


def test_packed_bytes():
    assert pack_nibbles(torch.tensor([[1, 2, -3, -8, 7]], dtype=torch.int8)).tolist() == [[0x21, 0x8D, 0x07]]
    assert pack_nibbles(torch.tensor([[0, 15, 9]], dtype=torch.int8)).tolist() == [[0xF0, 0x09]]
    assert pack_nibbles(torch.zeros(2, 0, dtype=torch.int8)).shape == (2, 0)


@pytest.mark.parametrize("k", [0, 1, 2, 5, 64, 131])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_nibbles_round_trip(rows, k):
    signed = torch.randint(-8, 8, (rows, k), dtype=torch.int8)
    unsigned = torch.randint(0, 16, (k, rows), dtype=torch.int8).T
    assert torch.equal(unpack_nibbles(pack_nibbles(signed), k, signed=True), signed)
    assert torch.equal(unpack_nibbles(pack_nibbles(unsigned), k, signed=False), unsigned)


def test_names_and_groups():
    assert format_of("int4") is INT4 and format_of("nvfp4", 16) == NVFP4
    assert format_of("int4", 128) == Format("int4", 128)
    assert [group_count(k, 64) for k in (0, 1, 64, 65)] == [0, 1, 1, 2] and group_count(65, 0) == 1


@pytest.mark.parametrize("call, sentence", [
    (lambda: format_of("int5"), "expected one of int4, uint4, nvfp4, int8, got 'int5'"),
    (lambda: Format("int4", -1), "expected a group of at least 0, got -1"),
    (lambda: encode(torch.zeros(2, 64), torch.ones(2, 2), INT4), r"scales: .* = \(2, 1\), got \(2, 2\)"),
    (lambda: decode(torch.zeros(2, 64), torch.ones(1, 1), INT4), r"scales: .* = \(2, 1\), got \(1, 1\)"),
    (lambda: fold_int8(torch.zeros(2, 64), torch.ones(1, 1), INT4), r"scales: .* = \(2, 1\), got \(1, 1\)"),
    (lambda: unpack_nibbles(torch.zeros(2, 3, dtype=torch.uint8), 7, True), r"codes: .*\(2, 4\), got \(2, 3\)"),
])
def test_errors(call, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        call()
