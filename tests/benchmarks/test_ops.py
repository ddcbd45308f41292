"""The op benchmark on tiny layers, without other packages."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.chains import CHAINS_OF_ROLE, Chain, Linear
from benchmarks.contenders import (
    BASELINE,
    Contender,
    chain_contenders,
    fresh,
    linear_contenders,
    ours,
    weight_only_contenders,
)
from benchmarks.ops import Bench, arguments, chosen_cases
from benchmarks.rows import Row, RowFile, line_of, read
from benchmarks.shapes import Case, Layer
from benchmarks.sites import Setting
from benchmarks.timing import Spread, Timed, interleave

ARGS = arguments(["--seconds", "0", "--limit", "5"])
LAYERS = {role: Layer("tiny", role, 256, 128, role, 1, (8, 8), "") for role in ("qkv", "out", "up", "geglu", "down")}


def bench(layer: Layer, kind: type[Chain] = Linear, m: int = 8) -> Bench:
    return Bench.of(Case(layer, m, "tiny"), kind, ARGS)


def test_rows_of_a_linear(tmp_path: Path) -> None:
    path = tmp_path / "ops.csv"
    with RowFile(path) as file:
        for row in bench(LAYERS["qkv"]).rows(linear_contenders(split=False, peers=False, everything=True)):
            assert not row.note, row.note
            assert line_of(row)
            file.write(row)
    rows = {row["contender"]: row for row in read([path])}
    assert rows[BASELINE]["speedup"] == "1" and float(rows[BASELINE]["error"]) < 0.01
    assert all(int(row["rounds"]) >= 3 and row["cpu"] and row["commit"] for row in rows.values())
    a8 = rows["nunchaku-py a8, int4 rank 32"]
    assert 0.05 < float(a8["error"]) < 0.2 and a8["backend"] in ("cpu", "torch")
    assert int(a8["stored_bytes"]) < int(rows[BASELINE]["stored_bytes"]) and int(a8["held_bytes"]) > 0


@pytest.mark.parametrize("role", CHAINS_OF_ROLE)
def test_fused_chains_compute_what_the_unfused_ones_do(role: str) -> None:
    for kind in CHAINS_OF_ROLE[role]:
        rows = list(bench(LAYERS[role], kind).rows(chain_contenders(peers=False)))
        assert not any(row.note for row in rows)
        assert rows[2].error == pytest.approx(rows[1].error, rel=0.05) and rows[1].error < 0.3


@pytest.mark.parametrize("role", ("down", "single_out"))
def test_linears_behind_a_gelu(role: str) -> None:
    """Shifted sites, and those of two parts, give in every mode what the 16-bit linear gives, but for rounding."""
    layer = Layer("tiny", role, 64, 3200, role, 1, (8, 8), "")
    rows = list(bench(layer).rows([ours(Setting("int4", 16, mode)) for mode in ("a4", "a8", "a16")]))
    assert not any(row.note for row in rows) and all(row.error < 0.3 for row in rows)


def test_weight_only_rows() -> None:
    rows = list(bench(LAYERS["qkv"], m=1).rows(weight_only_contenders(peers=False), "weight_only", before=lambda: None))
    assert [row.op for row in rows] == ["weight_only"] * 3 and all(row.gbps > 0 for row in rows)


def test_a_refusal_is_a_note() -> None:
    def refuse(chain: Chain, x: torch.Tensor) -> None:
        raise ImportError("no such package\nsecond line")

    row, = bench(LAYERS["qkv"]).rows([Contender("absent", "absent", refuse)])
    assert row.note == "ImportError: no such package" and row.median_ms == "" and "no such" in line_of(row)


def test_contenders_get_copies() -> None:
    reference = Linear(LAYERS["qkv"], 8).bfloat16()
    fresh(reference).proj.weight.zero_()
    assert reference.proj.weight.any()


def test_rounds_take_turns_and_ratios_are_of_rounds() -> None:
    order: list[str] = []
    timed = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b"), "bad": lambda: 1 / 0},
                       seconds=0, limit=5, before=lambda: order.append("-"))
    assert "".join(order) == "-a-b-" + "-a-b" * 3
    assert timed.notes == {"bad": "ZeroDivisionError: division by zero"}
    assert Timed({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, {}).speedup("a", "b") == Spread(1.0, 0.75, 1.5, 0.5)


def test_a_slow_call_has_one_round() -> None:
    timed = interleave({"a": lambda: None}, seconds=1, limit=0)
    assert len(timed.rounds["a"]) == 1 and "not repeated" in timed.notes["a"]


def test_quick_and_tokens_choose_fewer_cases() -> None:
    quick = chosen_cases(arguments(["--quick", "--tokens", "64"]))
    assert [case.m for case in quick] == [64, 64, 1]
    assert len(chosen_cases(arguments([]))) > 15


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    RowFile.create(path)
    with RowFile(path) as file:
        file.write(Row("d", "c", "cpu", "2", "1", "", "peak", "unit", tops=1.23456789))
    assert read([path])[0]["tops"] == "1.23457"
