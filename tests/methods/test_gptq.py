import dataclasses

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.formats import decode, encode
from nunchaku_py.methods.error import output_error
from nunchaku_py.methods.fit import fit
from nunchaku_py.methods.gptq import Grid, damping, gptq, inverse_factor, sweep, with_values
from tests.methods.layers import CTX, small


def naive(w, q, gram):
    """GPTQ as the paper writes it: the inverse of what is left, one column after another, in fp64."""
    w, values = w.double().clone(), torch.zeros_like(w)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    gram = gram.double()
    while order:
        j = order[0]
        inverse = torch.linalg.inv(gram[order][:, order])
        target = torch.zeros_like(values)
        target[:, j] = w[:, j].float() if q.channel_scale is None else (w[:, j] / q.channel_scale).float()
        values[:, j] = decode(encode(target, q.scales, q.format), q.scales, q.format, None, q.channel_scale)[:, j]
        error = (w[:, j] - values[:, j]) / inverse[0, 0]
        w[:, order] -= error[:, None] * inverse[0]
        order = order[1:]
    return values


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_same_codes_as_the_naive_algorithm(fmt):
    work, _ = small(fmt, rank=0, n=12, k=43)
    fit(work, CTX)
    gram = work.stats.gram + 0.05 * work.stats.gram.diagonal().mean() * torch.eye(43)
    order = gram.diagonal().argsort(descending=True, stable=True)
    columns = work.weight.T[order].contiguous()
    upper = inverse_factor(gram[order][:, order].flip(0, 1), 0.0, "a")
    sweep(columns, torch.empty_like(columns), Grid.of(work.residual, order), upper, 0)
    found = with_values(work.residual, columns, order).dequantize()
    same = (found - naive(work.weight, work.residual, gram)).abs() < 1e-6
    assert same.float().mean() > 0.99  # a tie may fall to the other side in fp32


def test_uncorrelated_inputs_leave_plain_rounding():
    work, _ = small()
    fit(work, CTX)
    before = work.residual.codes
    work.stats.gram = torch.eye(160)
    gptq(work, CTX)
    assert torch.equal(work.residual.codes, before)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_correlated_inputs_gain_on_held_out_tokens(fmt, gelu):
    work, held_out = small(fmt, gelu, rank=0)
    fit(work, CTX)
    before = output_error(work, CTX, "a16", held_out)
    gptq(work, CTX)
    assert output_error(work, CTX, "a16", held_out) < 0.95 * before


@pytest.mark.parametrize("rows", [1, 20, 80])
def test_few_rows_and_dead_channels_work_and_do_not_harm(rows):
    work, held_out = small(rank=0, rows=rows)
    held_out[:, 7] = 0
    work.stats.gram[7], work.stats.gram[:, 7], work.stats.second[7] = 0, 0, 0
    fit(work, CTX)
    before = output_error(work, CTX, "a16", held_out)
    gptq(work, CTX)
    assert output_error(work, CTX, "a16", held_out) < 1.02 * before
    assert damping(work, CTX) == pytest.approx(0.01 + 0.2 * 160 / rows)


def test_what_gptq_cannot_do_is_said():
    work, _ = small()
    work.stats.gram[3, 3] = float("nan")
    with pytest.raises(NunchakuError, match="a: the Gram matrix of the input is not positive definite, or not finite"):
        gptq(work, CTX)
    work.stats.gram = None
    with pytest.raises(NunchakuError, match="a: gptq needs the Gram matrix"):
        gptq(work, CTX)


def test_w4a16_site_with_few_rows_is_left_alone_and_logged():
    said = []
    work, _ = small(rank=0, rows=100)
    work.site = dataclasses.replace(work.site, kind="w4a16")
    gptq(work, dataclasses.replace(CTX, log=said.append))
    assert work.residual is None and "100 rows of calibration are too few for 160 channels" in said[0]
