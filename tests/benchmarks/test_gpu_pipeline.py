"""The benchmark of one step on a GPU, on a tiny model and this CPU."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nunchaku_py as nq
from benchmarks import gpu, gpu_ops, gpu_pipeline
from benchmarks.contenders import BASELINE
from benchmarks.flux_size import step_inputs
from benchmarks.gpu_models import TINY, blocks_that_fit, parameters, quantized_copy, random_model, source_of
from benchmarks.quick import CHOICES
from benchmarks.rows import names_of, read

NAMES = (BASELINE, "nunchaku-py a4", "nunchaku-py auto")
RECIPE = CHOICES["quick-int4"]
Rows = dict[tuple[str, str], dict[str, str]]


def run(folder: Path, *more: str) -> Rows:
    """(contender, eager or compile) → its row."""
    out = folder / "pipeline.csv"
    gpu_pipeline.main(["--out", str(out), "--tiny", "--device", "cpu", "--blocks", "1", "1", "--rounds-seconds", "0",
                       "--compiler", "eager", *more])
    rows = read([out])
    assert all(row["commit"] and row["torch"] == torch.__version__ and row["device"] and row["diffusers"]
               for row in rows)
    return {(row["contender"], row["run"]): row for row in rows}


def test_a_row_for_every_contender_eager_and_compiled(tmp_path: Path) -> None:
    rows = run(tmp_path)
    assert list(rows) == [(name, how) for how in ("eager", "compile") for name in NAMES]
    assert {(row["double"], row["single"], row["tokens"]) for row in rows.values()} == {("1", "1", "24")}
    for (name, how), row in rows.items():
        assert int(row["rounds"]) >= 5 and float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
        assert float(row["speedup"]) > 0 and bool(row["speedup_compiled"]) == (how == "compile")
        assert (0.02 < float(row["error"]) < 0.4) == (name != BASELINE)
        assert ("graphs in" in row["note"]) == (how == "compile")
    assert [rows[name, "eager"]["mode"] for name in NAMES] == ["bf16", "a4", "a8"]
    assert "linear_w4a4" in rows[NAMES[1], "eager"]["backends"]


def test_what_fails_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(model: object, recipe: object, mode: str, *more: object, **config: object) -> torch.nn.Module:
        if mode == "a8":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return quantized_copy(model, recipe, mode, *more, **config)
    monkeypatch.setattr(gpu_pipeline, "quantized_copy", no_memory)
    rows = run(tmp_path, "--compiler", "no such compiler")
    assert "out of memory" in rows[NAMES[2], "eager"]["note"] and not rows[NAMES[2], "eager"]["ms"]
    assert rows[NAMES[1], "eager"]["ms"] and not rows[NAMES[1], "eager"]["note"]
    for name in NAMES[:2]:
        assert "no such compiler" in rows[name, "compile"]["note"] and not rows[name, "compile"]["ms"]


def test_what_the_time_did_not_reach_is_said(tmp_path: Path) -> None:
    rows = run(tmp_path, "--seconds", "0")
    assert len(rows) == 6 and {row["note"] for row in rows.values()} == {"not reached within 0 s"}


@torch.no_grad()
def test_the_quantized_model_is_what_quantize_makes() -> None:
    """Where no block is a copy; and a copy has memory of its own."""
    model = random_model(1, 2, 0, "cpu", **TINY)
    inputs = step_inputs(model, 16, 8)
    y = quantized_copy(model, RECIPE, "a8", 0, **TINY)(**inputs).sample
    nq.quantize(model, RECIPE, mode="a8", progress=False)
    assert torch.equal(y, model(**inputs).sample)
    copies = quantized_copy(random_model(1, 2, 1, "cpu", **TINY), RECIPE, "a8", 1, **TINY)
    first, second = (block.proj_mlp.codes for block in copies.single_transformer_blocks)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_names_of_copies() -> None:
    assert source_of("single_transformer_blocks.11.attn.to_q.weight", 1) == (
        "single_transformer_blocks.0.attn.to_q.weight")
    assert source_of("transformer_blocks.5", 2) == "transformer_blocks.1"
    assert source_of("transformer_blocks.5", 0) == "transformer_blocks.5"
    assert source_of("proj_out.weight", 1) == "proj_out.weight"


def test_as_many_blocks_as_fit() -> None:
    outside, double, single = parameters()
    assert outside + 19 * double + 38 * single == pytest.approx(11.9e9, rel=0.01)
    assert blocks_that_fit(79 * 2**30, ("bf16", "a4", "a8")) == (19, 38)
    fewer = blocks_that_fit(24 * 2**30, ("bf16", "a4"))
    assert fewer[1] == 2 * fewer[0] and 2.65 * (fewer[0] * double + fewer[1] * single) < 20 * 2**30
    assert blocks_that_fit(2**30, ("bf16",)) == (1, 2)


def test_rows_of_both_benchmarks_begin_with_the_machine_and_the_code() -> None:
    columns = gpu.provenance("cpu")
    for kind in (gpu_ops.Row, gpu_pipeline.Row):
        assert set(names_of(kind)[:len(columns)]) == set(columns) == set(names_of(gpu.GpuRow))


def test_the_version_of_nvcc_is_read() -> None:
    assert gpu.version_in("Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/1_0") == "13.0.88"
    assert gpu.version_in("") == "unknown"


def test_the_headline_names_the_machine_and_the_code() -> None:
    columns = {**gpu.provenance("cpu"), "device": "NVIDIA H100", "capability": "9.0", "driver": "580.1"}
    line = gpu.headline(columns)
    assert line.startswith("NVIDIA H100 (9.0), driver 580.1, torch ") and "triton " in line and "nvcc " in line
    assert f"commit {columns['commit']}" in line
