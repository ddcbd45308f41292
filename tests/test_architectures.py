"""Every architecture we have a tiny model of: quantized by rule, its error is what rounding to 4 bits explains."""
from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.swap import quantized_modules
from tests.checks import noisy, relative, run
from tests.tiny import MODELS

RECIPES = ("svdquant-int4", "svdquant-nvfp4")
# Of the error that white noise as large as the rounding errors makes. The low-rank branch and the search for scales can
# only gain on plain rounding, so the ratio is below 1; and a model whose error is far smaller was not quantized.
LEAST, MOST = 0.2, 1.0
CALIBRATED = ("flux", "sdxl", "sana", "z_image")


@pytest.fixture(scope="module", params=[(name, recipe) for name in MODELS for recipe in RECIPES], ids="-".join)
def case(request):
    """(quantized model, the same in 16 bit, inputs, report, 16-bit output)"""
    name, recipe = request.param
    torch.manual_seed(0)
    (model, inputs), plain = MODELS[name](), MODELS[name]()[0]
    report = nq.quantize(model, recipe)
    return model, plain, inputs, report, run(plain, inputs)


def test_error_is_that_of_rounding(case) -> None:
    model, plain, inputs, report, dense = case
    expected, errors = {}, {}
    for quantized_inputs in (False, True):
        with noisy(plain, report.rows, quantized_inputs):
            expected[quantized_inputs] = relative(run(plain, inputs), dense)
    for mode in ("a4", "a8", "a16"):
        nq.set_mode(model, mode)
        y = run(model, inputs)
        assert y.isfinite().all() and y.dtype == dense.dtype and y.shape == dense.shape
        errors[mode] = relative(y, dense)
    assert LEAST * expected[False] < errors["a16"] < MOST * expected[False]
    assert LEAST * expected[False] < errors["a8"] < MOST * expected[False]
    assert LEAST * expected[True] < errors["a4"] < MOST * expected[True]
    assert errors["a16"] < errors["a4"]


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    def fits(module: nn.Module) -> bool:
        convolution = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        return isinstance(module, nn.Linear) or convolution

    return {name: module for name, module in model.named_modules() if fits(module)}


def test_report_speaks_of_every_linear_once(case) -> None:
    model, plain, _, report, _ = case
    linears = _linears(plain)
    done = {row.name for row in report.rows}
    assert done | set(report.kept) == set(linears) and not done & set(report.kept)
    assert done == set(quantized_modules(model))
    assert all(reason for reason in report.kept.values())
    for name in done:
        weights = sum(row.out_features * row.in_features for row in report.rows if row.name == name)
        assert weights == linears[name].weight.numel(), name
    share = sum(linears[name].weight.numel() for name in done) / sum(m.weight.numel() for m in linears.values())
    assert share > 0.5, f"only {share:.0%} of the weights of linears are in 4 bit"


def test_report_counts_bytes_as_they_are(case) -> None:
    model, plain, _, report, _ = case
    assert report.model_bytes_before == sum(p.numel() * p.element_size() for p in plain.parameters())
    assert report.model_bytes_after == sum(t.numel() * t.element_size() for t in model.state_dict().values()
                                           ) - sum(b.numel() * b.element_size() for b in _stored_buffers(model))
    assert report.model_bytes_after < report.model_bytes_before
    for row in report.rows:
        assert row.bytes_before == row.out_features * row.in_features * 2
        assert 0.5 * row.out_features * row.in_features < row.bytes_after


def _stored_buffers(model: nn.Module) -> list[torch.Tensor]:
    names = set(model.state_dict()) & {name for name, _ in model.named_buffers()}
    return [model.get_buffer(name) for name in names]


def test_report_comes_as_text_json_and_csv(case, tmp_path) -> None:
    *_, report, _ = case
    report.save(tmp_path)
    text = (tmp_path / "report.txt").read_text()
    assert all(row.name in text for row in report.rows)
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == len(report.rows)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert [row["name"] for row in rows] == [row.name for row in report.rows]
    assert all(0 < row.errors["refit"] < 0.2 for row in report.rows)
    assert all(float(row["error_refit"]) > 0 for row in rows)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_on_forward_arguments(name: str) -> None:
    (model, inputs), plain = MODELS[name](), MODELS[name]()[0]
    dense = run(plain, inputs)
    report = nq.quantize(model, "svdquant-int4", [inputs], mode="a4")
    assert {row.data for row in report.rows} == {"calibrated"} and not report.notes
    with noisy(plain, report.rows, True):
        expected = relative(run(plain, inputs), dense)
    assert LEAST * expected < relative(run(model, inputs), dense) < MOST * expected
