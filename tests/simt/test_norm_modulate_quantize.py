"""csrc/cuda/norm_modulate_quantize, executed on the host, against the reference of the op."""
from __future__ import annotations

import pytest
import torch

from nunchaku_py.ops import ActSpec, norm_modulate_quantize
from nunchaku_py.ops.quantize_act import unpack
from tests.simt.layouts import empty_of_tokens, tokens_in_rows


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("m, k, r, samples, mean", [(34, 320, 40, 2, 0), (17, 128, 0, 1, 30), (66, 448, 16, 3, 0)])
def test_norm_modulate_quantize(library, norm, m, k, r, samples, mean, order) -> None:
    """The normed value may have been rounded to its neighbour: then its code may be the next one, seldom."""
    dtype = torch.bfloat16 if norm == "layer" else torch.float16
    eps = torch.finfo(dtype).eps
    torch.manual_seed(m + k)
    x = (mean + torch.randn(m, k) * torch.rand(k).exp()).to(dtype)
    weight = (1 + torch.rand(k)).to(dtype)
    scale, shift = ((torch.randn(samples, k) / by).to(dtype) for by in (4, 1))
    inv_smooth, down = 0.5 + torch.rand(k), (torch.randn(r, k) / 4).to(dtype)
    qx = torch.zeros(m, k // 2, dtype=torch.uint8)
    sx = empty_of_tokens(m, x, k)
    h = torch.full((m, r), float("nan"))
    library.run(norm, x, weight, scale, shift, inv_smooth, down, qx, sx, h, m, k, r, m // samples, 1e-6, **order)
    spec = ActSpec("int4", 64, norm=norm, eps=1e-6)
    want = norm_modulate_quantize.reference(x, weight, scale, shift, inv_smooth, down, spec)
    sx = tokens_in_rows(sx, m)
    off = (unpack(qx, sx, k, spec.fmt)[0].int() - unpack(*want[:2], k, spec.fmt)[0].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    assert ((sx.double() - want[1].double()).abs() <= 2 * eps * want[1].double()).all()
    assert ((h - want[2]).abs() <= 4 * eps * k**0.5).all()
