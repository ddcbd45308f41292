"""The INT8 scale of nvfp4 rows: chosen as if each row were folded with every step that is allowed, number by number."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nunchaku_py.formats import INT4, INT8, NVFP4, Format, decode, encode, fold_int8, quantize_rows
from nunchaku_py.tensor import QTensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHAPES = [(0, 64), (1, 1), (3, 16), (2, 65), (5, 131), (7, 200), (2, 0)]
F = np.float32


def slow_error(sizes: list[np.float32], factor: np.float32) -> int:
    """Σ(32·e)² over (size of the code, its scale)."""
    total = 0
    for size, scale in sizes:
        steps = size * (scale * factor)
        total += round(float(F(32) * (steps - F(round(float(min(steps, F(127)))))))) ** 2
    return total


def slow_scale(sizes: list[np.float32], channel: np.float32, top: np.float32) -> float:
    plain = top / F(127)
    if not plain >= np.finfo(F).tiny:
        return float(plain)
    best, least = plain, F(slow_error(sizes, channel / plain))
    for part in (F(1), F(1.5)):
        wanted = Fraction(float(top / F(144) / channel / part))
        exponent = next(e for e in range(-140, 140) if Fraction(2) ** e >= wanted)
        step = channel * (F(2.0**exponent) * part)
        error = F(slow_error(sizes, channel / step)) * (step / plain * (step / plain))
        if error < least:
            best, least = step, error
    return float(best)


def rows_of(shape: tuple[int, int], fmt: Format = NVFP4):
    codes, scales = quantize_rows(torch.randn(shape) * 200, fmt, torch.bfloat16)
    return codes, scales, torch.rand(shape[0]) + 1e-3


@pytest.mark.parametrize("fmt", [NVFP4, Format("nvfp4", 32), Format("nvfp4", 0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_is_the_best_of_three(fmt, shape):
    codes, scales, channel = rows_of(shape, fmt)
    w8, s_ch = fold_int8(codes, scales, fmt, None, channel)
    w = decode(codes, scales, fmt, None, channel)
    assert w8.shape == shape and w8.dtype == torch.int8 and s_ch.shape == shape[:1] and s_ch.dtype == torch.float32
    group = fmt.group or max(shape[1], 1)
    for n in range(shape[0]):
        sizes = [(F(E2M1[code & 7]), F(scales[n, k // group].float())) for k, code in enumerate(codes[n].tolist())]
        top = max([F(0)] + [F(abs(v)) for v in w[n].tolist()])
        assert float(s_ch[n]) == slow_scale(sizes, F(channel[n]), top)
    assert torch.equal(w8, encode(w, s_ch[:, None], INT8))


def energy(q: QTensor, w8: torch.Tensor, s_ch: torch.Tensor) -> torch.Tensor:
    return (w8 * s_ch[:, None] - q.dequantize()).square().sum(1)


def plain(q: QTensor) -> torch.Tensor:
    w = q.dequantize()
    s_ch = w.abs().amax(1) / 127
    return energy(q, encode(w, s_ch[:, None], INT8), s_ch)


def heavy(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k) / torch.randn(4, n, k).square().mean(0).sqrt()


@pytest.mark.parametrize("make, bar", [(torch.randn, 0.65), (heavy, 1.0)])
@pytest.mark.parametrize("k", [256, 3072])
def test_it_takes_error_off_and_never_adds_any(make, bar, k):
    q = QTensor.quantize(make(64, k), NVFP4)
    found, before = energy(q, *q.fold_int8()), plain(q)
    assert (found <= before * 1.01).all()  # 1 %: errors are counted in 32nds
    assert found.sum() <= bar * before.sum()


def test_int4_keeps_the_largest_weight_on_127():
    q = QTensor.quantize(torch.randn(64, 768), INT4)
    assert torch.equal(q.fold_int8()[1], q.dequantize().abs().amax(1) / 127)


@pytest.mark.parametrize("channel", [-1.0, 0.0, math.nan, math.inf, 1e-40, 1e38, 1e-37])
def test_odd_channel_scales_fold_as_before_or_to_the_same_weights(channel):
    codes, scales = quantize_rows(torch.randn(3, 64), NVFP4, torch.bfloat16)
    per_row = torch.full((3,), channel)
    w8, s_ch = fold_int8(codes, scales, NVFP4, None, per_row)
    w = decode(codes, scales, NVFP4, None, per_row)
    if not math.isfinite(channel):
        assert s_ch.isnan().all() and not w8.any()
    else:
        assert (s_ch >= 0).all() and s_ch.isfinite().all()
        assert ((w8 * s_ch[:, None] - w).abs() <= 0.14 * w.abs().amax(1, keepdim=True) + 2.0**-148).all()
