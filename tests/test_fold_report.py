"""What the user is told of modes and of a8's fold: report, explain, inspect, and the pages on GPUs."""
from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.backends import cuda
from nunchaku_py.cli import main
from nunchaku_py.fold_report import SAMPLE, fold_error, fold_errors
from nunchaku_py.formats import INT4, NVFP4
from nunchaku_py.mode_lines import mode_lines
from nunchaku_py.ops import backend
from nunchaku_py.report import Report
from nunchaku_py.site import Site, auto_mode
from nunchaku_py.swap import quantized_sites
from nunchaku_py.tensor import QTensor
from tests.test_report import report, row
from tests.tiny import MODELS

PAGE = Path(__file__).parents[1] / "docs/cuda.md"


@pytest.fixture(scope="module")
def calibrated():
    model, inputs = MODELS["pixart"]()
    report = nq.quantize(model, "svdquant-nvfp4", data=[inputs], rank=4)
    return model, report


def exactly(q: QTensor) -> float:
    w8, s_ch = q.fold_int8()
    return ((w8 * s_ch[:, None] - q.dequantize()).norm() / q.dequantize().norm()).item()


@pytest.mark.parametrize("fmt", [INT4, NVFP4], ids=str)
def test_the_error_of_a_large_weight_is_that_of_some_of_its_rows(fmt) -> None:
    small, large = QTensor.quantize(torch.randn(30, 130), fmt), QTensor.quantize(torch.randn(1500, 700), fmt)
    assert large.shape[0] * large.k > 2 * SAMPLE
    assert fold_error(small) == pytest.approx(exactly(small), rel=1e-5)
    assert fold_error(large) == pytest.approx(exactly(large), rel=0.05)
    assert 0.001 < fold_error(large) < 0.015


def test_nothing_to_fold_has_no_error() -> None:
    assert fold_error(QTensor.quantize(torch.zeros(3, 64), INT4)) == 0
    assert fold_error(QTensor.quantize(torch.zeros(0, 64), NVFP4)) == 0


def test_quantize_reports_what_a8_does_to_every_site(calibrated) -> None:
    model, report = calibrated
    folds, kinds = fold_errors(model), {r.name: r.kind for r in report.rows}
    assert set(folds) == {name for name, kind in kinds.items() if kind == "w4a4"}
    for r in report.rows:
        if r.kind == "w4a4":
            assert r.fold == pytest.approx(folds[r.name]) and 0 < r.a8 < list(r.errors.values())[-1]
        else:
            assert r.fold is None and r.a8 is None


def test_without_data_nothing_is_said_of_the_outputs_in_a8() -> None:
    model, _ = MODELS["pixart"]()
    report = nq.quantize(model)
    header = report.text().splitlines()[0].split()
    assert "fold" in header and "a8" not in header and "mean error" not in report.text()


def test_text_json_and_csv_hold_it(calibrated) -> None:
    model, report = calibrated
    text = report.text()
    assert text.splitlines()[0].split()[-3:] == ["a8", "fold", "bytes"]
    assert re.search(r"^mean error of their outputs: [\d.]+% in mode a4, [\d.]+% in a8$", text, re.M)
    assert re.search(r"^fold: a8 changes 4-bit weights, which it folds to INT8, by [\d.]+% \([\d.]+% to ", text, re.M)
    assert f"modes on {mode_lines([model])[0]}" in text
    rows, data = list(csv.DictReader(io.StringIO(report.to_csv()))), json.loads(report.to_json())
    assert data["modes"] == mode_lines([model])
    for r, in_csv, in_json in zip(report.rows, rows, data["rows"], strict=True):
        assert in_json["fold"] == r.fold and in_csv["fold"] == ("" if r.fold is None else str(r.fold))
        assert in_json["a8"] == r.a8


def test_rows_of_an_earlier_release_have_no_such_columns() -> None:
    assert {"a8", "fold"}.isdisjoint(report().text().split())
    mixed = Report("r", [row("a"), row("b", fold=0.004, a8=0.05)])
    assert mixed.text().splitlines()[1].split()[-1] == "4.00x" and "0.40% (0.40% to 0.40%)" in mixed.text()


def test_explain_counts_modes_and_says_who_chose_them(calibrated) -> None:
    model, _ = calibrated
    sites = list(quantized_sites(model))
    wide = sum(site.site.kind == "w4a16" for site in sites)
    found = nq.explain(model)
    assert found.folds == fold_errors(model) and str(found).startswith(found.modes[0])
    line, = found.modes
    assert line.startswith("cpu: ") and f"{len(sites) - wide} sites in a8 (" in line and "the default here" in line
    assert not wide or f"{wide} sites in a16 (" in line
    assert "fold: a8 changes" in str(found)
    nq.set_mode(model, "a4")
    line, = nq.explain(model).modes
    assert f"{len(sites) - wide} sites in a4 (4-bit weights)" in line and "as asked for by mode=" in line
    nq.set_mode(model, "auto")


def test_inspect_reads_the_weights_when_asked(calibrated, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, report = calibrated
    nq.save(model, tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "fold" not in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "model"), "--fold", "--all"]) == 0
    said = capsys.readouterr().out
    for r in report.rows:
        line = next(line for line in said.splitlines() if line.split()[:1] == [r.name])
        assert (f"{100 * r.fold:.2f}" if r.kind == "w4a4" else "int4") in line.split()
    assert main(["inspect", str(tmp_path / "model"), "--fold"]) == 0
    assert "fold %" in capsys.readouterr().out
    nq.save(model, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path / "model.safetensors"), "--fold"]) == 0


GPUS = {(7, 5): ("a4", "a8"), (8, 0): ("a8", "a8"), (8, 6): ("a4", "a8"), (8, 9): ("a4", "a8"), (9, 0): ("a8", "a8"),
        (10, 0): ("a8", "a8"), (12, 0): ("a8", "a4"), (12, 1): ("a8", "a4")}


@pytest.mark.parametrize("capability", GPUS)
def test_defaults_of_gpus_are_those_of_the_page(capability, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda, "refuses_gpu", lambda capability: None)
    sites = Site("w4a4", "int4", 64), Site("w4a4", "nvfp4", 16)
    assert tuple(auto_mode(site, torch.device("cuda")) for site in sites) == GPUS[capability]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()
            if line.startswith("| ")]
    name = "{}.{}".format(*capability)
    listed = [row for row in rows if len(row) == 4 and name in row[1].split(", ")]
    assert [tuple(row[2:]) for row in listed] == [GPUS[capability]]


def test_without_a_compiled_kernel_int4_is_multiplied_in_8_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(cuda, "refuses_gpu", lambda capability: "it was not built")
    assert auto_mode(Site("w4a4", "int4", 64), torch.device("cuda")) == "a8"
    monkeypatch.setattr(cuda, "refuses_gpu", lambda capability: None)
    assert auto_mode(Site("w4a4", "int4", 64), torch.device("cuda")) == "a4"
    with backend("triton"):
        assert auto_mode(Site("w4a4", "int4", 64), torch.device("cuda")) == "a8"


def test_info_says_the_default_mode_of_every_device(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    part = said[said.index("default modes"):].splitlines()
    assert part[1].split() == ["device", "int4", "file", "nvfp4", "file", "weight-only", "sites", "weights", "in", "a8"]
    assert ["cpu", "a8", "a8", "a16", "int4"] in [line.split() for line in part] and "nq.set_mode(model, mode)" in said
