import dataclasses

import pytest
import torch

from nunchaku_py.methods.error import output_error
from nunchaku_py.methods.lowrank import lowrank
from nunchaku_py.methods.smooth import NVFP4_TOP, analytic, choose, factor, smooth
from nunchaku_py.methods.smooth_exact import exact
from tests.methods.layers import CTX, small


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_analytic_choice_is_nearly_as_good_as_the_exact_one(fmt, gelu):
    for seed in range(3):
        errors = []
        for score in (analytic, exact):
            work, held_out = small(fmt, gelu, seed=seed, n=192, k=256)
            choose(work, CTX, score)
            lowrank(work, CTX)
            errors.append(output_error(work, CTX, tokens=held_out))
        assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_dead_channels_and_wild_ranges(fmt, dtype):
    work, _ = small(fmt)
    ctx = dataclasses.replace(CTX, scale_dtype=dtype)
    work.weight = work.weight.clone()
    work.weight[:, 5] = 0
    work.stats.absmax[:3] = torch.tensor([0.0, 1e30, 1e-30])
    found = factor(work.stats.absmax, work.weight.abs().amax(0), 0.5, 0.5, work, ctx)
    assert found.isfinite().all() and (found > 0).all() and found[0] == found[5] == 1
    assert torch.equal(found, found.to(dtype).float())
    smooth(work, ctx)
    assert work.smooth.isfinite().all()


def test_nvfp4_inputs_end_where_e4m3_scales_are_exact():
    for scale in (1e-3, 1.0, 1e3):
        work, _ = small("nvfp4")
        top = work.stats.absmax * scale
        found = factor(top, work.weight.abs().amax(0), 0.5, 0.5, work, CTX)
        assert NVFP4_TOP / 2 * 0.99 <= (top / found).max() <= NVFP4_TOP * 1.01


def test_all_zero_input_keeps_one():
    work, _ = small()
    zero = torch.zeros(160)
    assert torch.equal(factor(zero, zero, 0.5, 0.5, work, CTX), torch.ones(160))
