"""The benchmark of attention on a GPU, on a tiny one and this CPU."""
from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu_attention
from benchmarks.rows import read

Line = dict[str, str]
FLASH = "torch sdpa flash"


def run(folder: Path, *more: str) -> dict[str, Line]:
    """Contender → its row."""
    out = folder / "attention.csv"
    gpu_attention.main(["--out", str(out), "--tiny", "--device", "cpu", "--rounds", "3", *more])
    rows = read([out])
    assert [row["contender"] for row in rows] == list(gpu_attention.contenders())
    assert all(row["commit"] and row["device"] for row in rows)
    return {row["contender"]: row for row in rows}


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.triton.conftest import taken_for_gpu

    taken_for_gpu(monkeypatch, (8, 9))


def test_a_row_for_every_contender(tmp_path: Path, as_gpu: None, capsys: pytest.CaptureFixture) -> None:
    rows = run(tmp_path)
    for name in (FLASH, *gpu_attention.OURS):
        row = rows[name]
        assert [row[size] for size in ("heads", "tokens", "keys", "channels", "rounds")] == ["2", "40", "50", "64", "3"]
        assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"]) and float(row["tops"]) > 0
        assert row["baseline"].startswith("torch sdpa ") and float(row["speedup"]) > 0
        assert float(row["error"]) < (0.005 if name.startswith("torch") else 0.05)
    assert rows[rows[FLASH]["baseline"]]["speedup"] == "1"
    assert "TOPS  error" in capsys.readouterr().out


def test_who_refuses_has_a_row_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = run(tmp_path)
    for name in gpu_attention.OURS:
        assert rows[name]["note"] == "no kernel: the tensors are on cpu" and not rows[name]["ms"]
    assert rows[FLASH]["ms"] and "no figure: no kernel: the tensors are on cpu" in capsys.readouterr().out


def test_what_the_time_did_not_reach_is_said(tmp_path: Path) -> None:
    assert {row["note"] for row in run(tmp_path, "--seconds", "0").values()} == {"not reached within 0 s"}


def test_operands_are_larger_than_caches_and_lie_as_diffusers_do() -> None:
    for sizes in gpu_attention.SHAPES.values():
        on = gpu_attention.Problem(*sizes, "meta", gpu_attention.SPREAD)
        assert sum(2 * t.numel() for q, k, v in on.sets for t in (q, k, v)) >= gpu_attention.SPREAD
        assert all(t.transpose(1, 2).is_contiguous() for t in on.sets[0])
