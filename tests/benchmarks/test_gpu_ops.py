"""The benchmark of linears on a GPU, on a tiny one and this CPU; and what is made of its rows."""
from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu, gpu_bars, gpu_linears, gpu_ops
from benchmarks.contenders import BASELINE
from benchmarks.gpu_linears import contenders
from benchmarks.rows import read
from benchmarks.timing import Timed

NAMES = [one.name for one in contenders()]
INT8, INT4 = "nunchaku-py a8 int4, weights int8", "nunchaku-py a8 int4, weights int4"
Line = dict[str, str]


def run(folder: Path, *more: str) -> dict[str, Line]:
    """Contender → its row."""
    out = folder / "ops.csv"
    gpu_ops.main(["--out", str(out), "--tiny", "--device", "cpu", "--rounds", "3", "--compiler", "eager", *more])
    rows = read([out])
    assert [row["contender"] for row in rows] == NAMES and all(row["commit"] and row["device"] for row in rows)
    return {row["contender"]: row for row in rows}


def test_a_row_for_every_contender_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = run(tmp_path)
    assert sum("by triton" in name for name in rows) == 3
    for name, row in rows.items():
        if "by triton" in name:
            assert "triton: the tensors are on cpu" in row["note"] and not row["ms"]
            continue
        assert (row["m"], row["n"], row["k"], row["rounds"]) == ("32", "256", "128", "3")
        assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
        assert float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
        assert len(row["rounds_ms"].split()) == 3 and row["held_bytes"] and not row["int8_peak"]
        most = 0.25 if "nunchaku" in name else 0.05
        assert float(row["error"]) == 0 if name == BASELINE else 0.001 < float(row["error"]) < most
        assert ("product only" in row["note"]) == ("product only" in name)
    said = capsys.readouterr().out
    assert "bars: open, they are of GPUs of compute capability 9.0" in said and "of INT8 peak" not in said


def test_what_a_weight_is_held_as_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels that expand 4 bits in every call, it is folded whatever was asked for."""
    monkeypatch.setenv("NUNCHAKU_PY_BACKEND", "torch")
    rows = run(tmp_path)
    assert rows[INT8]["weights"] == rows[INT4]["weights"] == "int8" and not rows[INT8]["note"]
    assert rows[INT4]["note"] == "asked for int4 weights, holds int8"
    assert int(rows[INT8]["held_bytes"]) > int(rows["nunchaku-py a4 int4"]["held_bytes"])


def test_who_refuses_or_fails_has_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture) -> None:
    def no_fp8(*args: object) -> None:
        raise RuntimeError("Rowwise scaling is not supported on this GPU\nsecond line")

    def no_kernel(layer: object, on: object) -> str:
        raise gpu_linears.Refused("no kernel: not built")
    monkeypatch.setattr(gpu_linears, "fp8_product", no_fp8)
    monkeypatch.setattr(gpu_linears, "backend_of", no_kernel)
    rows = run(tmp_path, "--compiler", "no such compiler")
    assert rows["torch fp8 row-wise, eager"]["note"].endswith("Rowwise scaling is not supported on this GPU")
    assert rows[INT8]["note"] == "no kernel: not built" and "no such compiler" in rows[NAMES[-2]]["note"]
    assert rows[BASELINE]["ms"] and not rows[INT8]["ms"]
    assert "no figure: no kernel: not built" in capsys.readouterr().out


def test_what_the_time_did_not_reach_is_said(tmp_path: Path) -> None:
    assert {row["note"] for row in run(tmp_path, "--seconds", "0").values()} == {"not reached within 0 s"}


def test_the_part_of_the_peak_is_told_where_it_is_known() -> None:
    columns = {**gpu.provenance("cpu"), "device": "NVIDIA H200"}
    row = gpu_ops.Row(**columns, shape="qkv", m=4608, n=3072, k=3072, contender="one")
    row.fill(Timed({"one": [1e-4]}, {}))
    assert row.tops == pytest.approx(869.7, rel=1e-3) and row.int8_peak == pytest.approx(869.7 / 1979, rel=1e-3)


def test_rows_of_most_tokens_come_first() -> None:
    args = gpu_ops.arguments(["--out", "ops.csv"])
    assert args.rows == (4608, 4096, 512) and list(args.shapes) == list(gpu_ops.SHAPES)


def test_operands_are_larger_than_caches() -> None:
    on = gpu_linears.Operands(512, 3072, 3072, "meta")
    assert on.sets * (2 * on.m * on.k + on.n * on.k // 2) >= gpu_linears.SPREAD


# ----------------------------------------------------------------------------------------------------------------- bars
def line(contender: str, rounds: str, n: str = "3072", k: str = "12288", m: str = "4608", **more: str) -> Line:
    return {"shape": "down", "m": m, "n": n, "k": k, "device": "GPU", "capability": "9.0", "contender": contender,
            "mode": "", "format": "", "weights": "", "ms": rounds.split()[0] if rounds else "", "tops": "900",
            "int8_peak": "0.5", "speedup": "", "error": "0.1", "note": "", "rounds_ms": rounds, **more}


def a8(weights: str, rounds: str, **more: str) -> Line:
    return line(f"nunchaku-py a8 int4, weights {weights}", rounds, **{
        "mode": "a8", "format": "int4", "weights": weights, **more})


def bars(*lines: Line) -> list[str]:
    return [text.strip() for text in gpu_bars.summary(lines).splitlines() if "bar" in text]


def test_what_triton_is_to_reach_is_a_bar_of_its_own() -> None:
    triton = {**a8("int8", "2 4 2"), "contender": "nunchaku-py a8 int4, weights int8, by triton"}
    assert bars(line(BASELINE, "3 6 3"), triton, a8("int8", "1 2 1"))[-1] == (
        "a8 int4, by triton, weights int8, over bf16, bar 1.2: met by 1.500 (1.500-1.500)")
    assert "weights int8, over bf16, bar 1.5: open, not measured" in bars(line(BASELINE, "3 6 3"), triton)[0]


def test_bars_are_met_or_missed_by_ratios_of_rounds() -> None:
    bf16 = line(BASELINE, "3 6 3")
    assert bars(bf16, a8("int8", "2 3 2"), a8("int4", "2.5 4 2.5")) == [
        "a8 int4, weights int8, over bf16, bar 1.5: met by 1.500 (1.500-1.750)",
        "a8 int4, weights int4 over int8, bar 0.85: MISSED by 0.800 (0.775-0.800)"]


def test_the_smallest_product_has_a_bar_of_its_own() -> None:
    small = {"n": "3072", "k": "3072"}
    found = bars(line(BASELINE, "3 3 3", **small), a8("int8", "2.2 2.2 2.5", **small))
    assert "bar 1.3: met by 1.364" in found[0] and "within the spread" in found[0]
    assert found[1].endswith("bar 0.85: open, not measured")


def test_without_a_measurement_bars_are_open() -> None:
    refused = a8("int8", "", note="no kernel")
    assert all("open, not measured" in text for text in bars(line(BASELINE, "3 3 3"), refused))
    held = a8("int8", "2 2 2"), a8("int8", "2 2 2") | {"contender": INT4}
    assert "open, not measured" in bars(line(BASELINE, "3 3 3"), *held)[1]
    assert bars(line(BASELINE, "3 3", m="512"), a8("int8", "2 2", m="512")) == ["bars: none below 4096 rows"]
    assert "open" in bars(line(BASELINE, "3 3", capability="8.9"))[0]
