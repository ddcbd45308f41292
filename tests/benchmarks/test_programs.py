"""The larger benchmark programs, on tiny models."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import blocks, flux_folder, flux_quantize, flux_size, plot
from benchmarks.contenders import BASELINE
from benchmarks.gpu_models import TINY
from benchmarks.rows import Row, RowFile, read
from nunchaku_py.bench.known import KNOWN


@pytest.mark.parametrize(("double", "single", "path"), [(1, 0, "transformer_blocks.0"),
                                                        (0, 1, "single_transformer_blocks.0")])
def test_rows_of_a_block(double: int, single: int, path: str) -> None:
    case = blocks.BlockCase("tiny", "FluxTransformer2DModel", {**TINY, "num_layers": double,
                                                               "num_single_layers": single}, path,
                            lambda model, tokens: blocks.flux_inputs(model, tokens, text=8), 16)
    rows = blocks.measure(case, blocks.arguments(["--seconds", "0", "--no-memory"]))
    assert rows[0].contender == BASELINE and all(isinstance(row.median_ms, float) for row in rows)
    assert rows[0].error < 0.1 and all(0.02 < row.error < 0.4 for row in rows[1:])
    assert all(row.stored_bytes < rows[0].stored_bytes for row in rows[1:])


@pytest.mark.parametrize("distinct", ("1", "0"))
def test_a_model_is_written_block_by_block_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture, distinct: str) -> None:
    monkeypatch.setitem(KNOWN, "flux.1-dev", replace(KNOWN["flux.1-dev"], config=TINY))
    common = ["--folder", str(tmp_path / "model"), "--threads", "1"]
    flux_size.build(flux_size.arguments(["build", *common, "--double", "2", "--single", "2", "--distinct", distinct]))
    out = tmp_path / "step.csv"
    flux_size.step(flux_size.arguments(["step", *common, "--tokens", "16", "--out", str(out), "--steps", "1"]))
    assert "finite, " in capsys.readouterr().out
    row, = read([out])
    assert row["op"] == "step" and row["shape"].endswith("2 + 2 blocks") and float(row["peak_bytes"]) > 0


def test_a_16_bit_folder_is_made_and_quantized_the_same_after_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(KNOWN, "flux.1-dev", replace(KNOWN["flux.1-dev"], config=TINY))
    flux_folder.build(tmp_path / "flux", 1, 1)
    common = ["program", str(tmp_path / "flux")]
    monkeypatch.setattr("sys.argv", [*common, str(tmp_path / "whole"), "--out", str(tmp_path / "rows.csv")])
    flux_quantize.main()
    row, = read([tmp_path / "rows.csv"])
    assert row["within"] == "yes" and 0.1 < float(row["peak"]) < 2
    monkeypatch.setattr("sys.argv", [*common, str(tmp_path / "again"), "--killed", "1", "--between", "3", "5", "--like",
                                     str(tmp_path / "whole")])
    flux_quantize.main()
    assert "identical to" in capsys.readouterr().out


def rows_file(path: Path) -> Path:
    common = {"date": "d", "commit": "c", "cpu": "cpu", "torch": "2", "threads": "1", "shape": "s", "m": 8, "n": 8,
              "k": 8, "op": "linear", "tops": 1.0, "stored_bytes": 10}
    with RowFile(path) as file:
        for isa, name, ratio in (("", BASELINE, 1.0), ("amx", "nunchaku-py a8", 2.0), ("avx2", "nunchaku-py a8", 1.5),
                                 ("", BASELINE, 1.0), ("", "sdnq", "")):
            file.write(Row(**common, isa=isa, contender=name, speedup=ratio, speedup_low=ratio, speedup_high=ratio))
    return path


def test_a_plot_has_a_bar_for_each_contender_and_instruction_set(tmp_path: Path) -> None:
    found = plot.panels(read([rows_file(tmp_path / "rows.csv")]), "linear", ["*"])
    assert list(found) == ["s, 8×8 → 8, 1 threads"]
    assert [row["label"] for row in found["s, 8×8 → 8, 1 threads"]] == [
        BASELINE, "nunchaku-py a8 [avx2]", "nunchaku-py a8"]
    assert plot.remark(found["s, 8×8 → 8, 1 threads"][0]) == "1.00×  1.00 TOP/s  1e-05 MB"


def test_a_plot_is_drawn_or_says_what_is_missing(tmp_path: Path) -> None:
    csv, out = rows_file(tmp_path / "rows.csv"), tmp_path / "rows.png"
    assert "there are linear" in plot.main([str(csv), "--op", "mlp", "--out", str(out)])
    said = plot.main([str(csv), "--out", str(out)])
    assert out.stat().st_size > 1000 if said is None else "matplotlib is not installed" in said
