"""The report as text, JSON and CSV."""

import csv
import io
import json
from pathlib import Path

import torch

from nunchaku_py.report import Report, SiteRow, merged


def row(name: str, **more: object) -> SiteRow:
    fields = dict(kind="w4a4", format="int4", rank=8, out_features=64, in_features=32, k_range=None, bytes_before=4096,
                  bytes_after=1024, data="calibrated", errors={"before": 0.2, "lowrank": 0.1})
    return SiteRow(name, **{**fields, **more})


def report() -> Report:
    rows = [row("a.to_q"), row("a.to_k"), row("b.out", k_range=(0, 16), errors={"before": 0.3}),
            row("b.out", k_range=(16, 32))]
    return Report("svdquant-int4", rows, {"norm": "outside the repeated blocks", "head": "outside the repeated blocks"},
                  [["a.to_q", "a.to_k"]], 4 * 2**20, 2**20, 1.5, ["c: no calibration"], torch.bfloat16)


def test_text_shows_every_site_its_errors_and_the_totals() -> None:
    lines = report().text().splitlines()
    assert lines[0].split() == ["site", "kind", "format", "rank", "N", "K", "data", "before", "lowrank", "bytes"]
    assert lines[1].split() == ["a.to_q", "w4a4", "int4", "8", "64", "32", "calibrated", "20.00%", "10.00%", "4.00x"]
    assert lines[3].split()[0] == "b.out[0:16]"
    assert "kept in 16 bit: 2 (outside the repeated blocks)" in lines
    assert lines[-2:] == ["3 linears quantized by svdquant-int4 in 1.5 s: 4.00 MiB -> 1.00 MiB (4.00x smaller)",
                          "c: no calibration"]


def test_text_can_be_cut_and_says_so() -> None:
    assert "… and 3 more sites" in report().text(limit=1)


def test_csv_and_json_hold_the_same_rows(tmp_path: Path) -> None:
    report().save(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    data = json.loads((tmp_path / "report.json").read_text())
    assert [r["name"] for r in rows] == [r["name"] for r in data["rows"]] == ["a.to_q", "a.to_k", "b.out", "b.out"]
    assert rows[2]["error_lowrank"] == "" and float(rows[0]["error_lowrank"]) == 0.1
    assert data["model_dtype"] == "bfloat16" and (tmp_path / "report.txt").read_text().startswith("site")


def test_summary_holds_nothing_that_differs_from_run_to_run() -> None:
    slow = report()
    slow.seconds = 99.0
    expected = {"sites": 3, "kept": 2, "bytes_before": 4 * 2**20, "bytes_after": 2**20}
    assert slow.summary() == report().summary() == expected


def test_merged_reports_name_the_component() -> None:
    both = merged({"transformer": report(), "text_encoder": report()})
    assert both.rows[0].name == "transformer.a.to_q" and both.rows[4].name == "text_encoder.a.to_q"
    assert both.kept["text_encoder.norm"] and both.groups[1] == ["text_encoder.a.to_q", "text_encoder.a.to_k"]
    assert both.model_bytes_before == 8 * 2**20 and both.recipe == "svdquant-int4"
    single = report()
    assert merged({"": single}) is single
