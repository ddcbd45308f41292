"""The benchmark of one step on a GPU, on tiny models and this CPU."""
from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import nunchaku_py as nq
from benchmarks import gpu, gpu_ops, gpu_pipeline, gpu_step
from benchmarks.contenders import BASELINE
from benchmarks.gpu_models import (
    TINY,
    TINY_UNET,
    Architecture,
    Flux,
    Sdxl,
    blocks_that_fit,
    parameters,
    quantized_copy,
)
from benchmarks.gpu_step import FP8
from benchmarks.rows import names_of, read
from nunchaku_py.bench.quick import CHOICES
from nunchaku_py.bench.random_models import Sources, random_model

INT8, INT4 = "nunchaku-py a8, weights int8", "nunchaku-py a8, weights int4"
NAMES = (BASELINE, FP8, "nunchaku-py auto", INT8, INT4)
SAME = "the same as nunchaku-py auto on this device"  # a CPU's mode is a8, its weights 4 bit
MEASURED = (BASELINE, "nunchaku-py auto", INT8)
RECIPE = CHOICES["quick-int4"]
Rows = dict[tuple[str, str], dict[str, str]]


def run(folder: Path, *more: str) -> Rows:
    """(contender, eager or compile) → its row."""
    out = folder / "pipeline.csv"
    gpu_pipeline.main(["--out", str(out), "--tiny", "--device", "cpu", "--rounds-seconds", "0", "--compiler", "eager",
                       *more])
    rows = read([out])
    assert all(row["commit"] and row["torch"] == torch.__version__ and row["device"] and row["diffusers"]
               for row in rows)
    return {(row["contender"], row["run"]): row for row in rows}


def expect_figures(rows: Rows, name: str, how: str) -> None:
    row = rows[name, how]
    assert int(row["rounds"]) >= 5 and float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
    assert float(row["speedup"]) > 0 and bool(row["speedup_compiled"]) == (how == "compile")
    assert (0.02 < float(row["error"]) < 0.4) == (name != BASELINE)
    assert ("graphs in" in row["note"]) == (how == "compile")


def test_a_row_for_every_contender_eager_and_compiled(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = run(tmp_path, "--blocks", "1", "1")
    assert list(rows) == [(name, how) for how in ("eager", "compile") for name in NAMES]
    assert {(row["model"], row["blocks"], row["batch"], row["tokens"]) for row in rows.values()} == {
        ("FLUX.1", "1+1", "1", "24")}
    for how in ("eager", "compile"):
        for name in MEASURED:
            expect_figures(rows, name, how)
        assert rows[INT4, how]["note"] == SAME
    assert [rows[name, "eager"]["mode"] for name in NAMES] == ["bf16", "fp8", "a8", "a8", "a8"]
    assert rows[INT8, "eager"]["weights"] == "int4"  # what it holds, whatever was asked for
    assert "linear_w4a8" in rows[INT8, "eager"]["backends"]
    said = capsys.readouterr().out
    assert "x bf16 compiled" in said and f"{INT4} (a8)  eager  no figure  {SAME}" in said


def test_a_step_of_sdxl(tmp_path: Path) -> None:
    """As many graphs as there are widths, whatever the number of blocks."""
    rows = run(tmp_path, "--model", "sdxl", "--contenders", "auto")
    assert {(row["model"], row["blocks"], row["batch"], row["pixels"]) for row in rows.values()} == {
        ("SDXL", "11", "2", "64")}
    for how in ("eager", "compile"):
        for name in (BASELINE, "nunchaku-py auto"):
            expect_figures(rows, name, how)
    note = rows["nunchaku-py auto", "compile"]["note"]
    assert note.startswith("compiled ") and int(note.split()[1]) <= 4, note


def test_only_the_contenders_asked_for(tmp_path: Path) -> None:
    rows = run(tmp_path, "--blocks", "1", "1", "--contenders", "a4", "--no-compile")
    assert [name for name, _ in rows] == [BASELINE, "nunchaku-py a4"]
    assert "linear_w4a4" in rows["nunchaku-py a4", "eager"]["backends"]


def test_what_fails_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def as_it_is(what: Architecture, model: torch.nn.Module) -> torch.nn.Module:
        return model
    monkeypatch.setattr(gpu_pipeline, "quantized_copy", no_memory)
    monkeypatch.setattr(gpu_pipeline, "fp8_copy", as_it_is)
    rows = run(tmp_path, "--blocks", "1", "1", "--compiler", "no such compiler")
    assert "out of memory" in rows[INT8, "eager"]["note"] and not rows[INT8, "eager"]["ms"]
    assert rows[BASELINE, "eager"]["ms"] and not rows[BASELINE, "eager"]["note"]
    assert rows[FP8, "eager"]["note"] == "meant for compile only"
    for name in (BASELINE, FP8):
        assert "no such compiler" in rows[name, "compile"]["note"] and not rows[name, "compile"]["ms"]


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_a_missing_package_is_said(tmp_path: Path) -> None:
    rows = run(tmp_path, "--blocks", "1", "1", "--contenders", "fp8", "--no-compile")
    assert "No module named 'torchao'" in rows[FP8, "eager"]["note"]


def test_what_the_time_did_not_reach_is_said(tmp_path: Path) -> None:
    rows = run(tmp_path, "--seconds", "0")
    assert len(rows) == 10 and {row["note"] for row in rows.values()} == {"not reached within 0 s", SAME}


@torch.no_grad()
def test_the_quantized_model_is_what_quantize_makes() -> None:
    """Where no block is a copy; and a copy has memory of its own."""
    what = Flux(1, 2, 8, TINY)
    model = random_model(what.empty(), 0)
    inputs = what.inputs(model, 64, "cpu")
    y = quantized_copy(what, model, RECIPE, "a8", "auto", 0)(**inputs).sample
    nq.quantize(model, RECIPE, mode="a8", progress=False)
    assert torch.equal(y, model(**inputs).sample)
    copies = quantized_copy(what, random_model(what.empty(), 1), RECIPE, "a8", "auto", 1)
    first, second = (block.proj_mlp.codes for block in copies.single_transformer_blocks)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_names_of_copies() -> None:
    flux = Flux(6, 12, 512).empty()
    one, two, none = (Sources(flux, distinct) for distinct in (1, 2, 0))
    assert one("single_transformer_blocks.11.attn.to_q.weight") == "single_transformer_blocks.0.attn.to_q.weight"
    assert two("transformer_blocks.5") == "transformer_blocks.1"
    assert none("transformer_blocks.5") == "transformer_blocks.5" and one("proj_out.weight") == "proj_out.weight"


def test_sdxl_is_the_real_one_and_its_blocks_are_of_two_widths() -> None:
    real = Sdxl(2, 77)
    source_of = Sources(real.empty(), 1)
    assert len(real.block_names) == 70 and real.tokens(1024) == 4096
    assert set(map(source_of, real.block_names)) == {f"down_blocks.{i}.attentions.0.transformer_blocks.0"
                                                     for i in (1, 2)}
    inputs = real.inputs(real.empty(), 1024, "cpu")
    assert inputs["sample"].shape == (2, 4, 128, 128) and inputs["encoder_hidden_states"].shape == (2, 77, 2048)
    assert inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 1280)


@torch.no_grad()
def test_a_random_unet_keeps_sizes() -> None:
    what = Sdxl(1, 8, TINY_UNET)
    model = random_model(what.empty(), 1)
    y = model(**what.inputs(model, 64, "cpu")).sample
    assert y.shape == (1, 4, 8, 8) and 0.1 < y.float().std() < 10


def test_memory_is_reckoned_for_everybody_who_takes_part() -> None:
    args = gpu_pipeline.arguments(["--out", "rows.csv", "--device", "cpu"])
    assert gpu_pipeline.kinds(args) == ["bf16", "fp8", "a8 int4", "a8 int8"]
    assert blocks_that_fit(84 * 10**9, gpu_pipeline.kinds(args)) == (19, 38)


def test_as_many_blocks_as_fit() -> None:
    outside, double, single = parameters()
    assert outside + 19 * double + 38 * single == pytest.approx(11.9e9, rel=0.01)
    assert blocks_that_fit(79 * 2**30, ("bf16", "a4", "a8 int8")) == (19, 38)
    fewer = blocks_that_fit(24 * 2**30, ("bf16", "a4"))
    assert fewer[1] == 2 * fewer[0] and 2.65 * (fewer[0] * double + fewer[1] * single) < 20 * 2**30
    assert blocks_that_fit(2**30, ("bf16",)) == (1, 2)


def test_rows_of_both_benchmarks_begin_with_the_machine_and_the_code() -> None:
    columns = gpu.provenance("cpu")
    for kind in (gpu_ops.Row, gpu_step.Row):
        assert set(names_of(kind)[:len(columns)]) == set(columns) == set(names_of(gpu.GpuRow))


def test_the_version_of_nvcc_is_read() -> None:
    assert gpu.version_in("Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/1_0") == "13.0.88"
    assert gpu.version_in("") == "unknown"


def test_the_headline_names_the_machine_and_the_code() -> None:
    columns = {**gpu.provenance("cpu"), "device": "NVIDIA H100", "capability": "9.0", "driver": "580.1"}
    line = gpu.headline(columns)
    assert line.startswith("NVIDIA H100 (9.0), driver 580.1, torch ") and "triton " in line and "nvcc " in line
    assert f"commit {columns['commit']}" in line
