"""`nunchaku-py convert` and what `inspect` says of packed linears, on a miniature pipeline."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nunchaku_py as nq
from nunchaku_py import cli
from tests.checks import QUICK, differences, files_in, state_of
from tests.tiny_pipelines import flux_prompt


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized FLUX pipeline folder; tests do not change it."""
    folder = tmp_path_factory.mktemp("source") / "flux"
    pipe, _ = flux_prompt()
    nq.quantize(pipe, QUICK)
    nq.save(pipe, folder)
    return folder


@pytest.fixture(scope="module")
def peer(pipeline: Path) -> Path:
    """Its transformer as a file of Nunchaku's."""
    path = pipeline.parent / "svdq.safetensors"
    assert cli.main(["convert", str(pipeline / "transformer"), str(path), "--to", "nunchaku"]) == 0
    return path


def convert(*argv: object) -> int:
    return cli.main(["convert", *map(str, argv)])


def refused(capsys: pytest.CaptureFixture, *argv: object) -> str:
    capsys.readouterr()
    code, said = convert(*argv), capsys.readouterr().err
    assert code == 1 and said.startswith("nunchaku-py: ") and said.count("\n") == 1, said
    return said


def stored(folder: Path) -> dict:
    return state_of(nq.load(folder))


def test_every_form_and_back(pipeline: Path, peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    good = stored(pipeline / "transformer")
    assert convert(peer, tmp_path / "folder") == convert(peer, tmp_path / "single.safetensors") == 0
    assert "every tensor was kept bit for bit" in capsys.readouterr().out
    assert not differences(good, stored(tmp_path / "folder"))
    assert not differences(good, stored(tmp_path / "single.safetensors"))
    assert convert(tmp_path / "single.safetensors", tmp_path / "lite", "--to", "nunchaku_lite") == 0
    said = capsys.readouterr().out
    assert "what changed" in said and "no longer are" in said and f"written: {tmp_path / 'lite'}" in said
    assert convert(tmp_path / "lite", tmp_path / "from-lite") == 0
    assert files_in(tmp_path / "from-lite") == files_in(tmp_path / "folder")


def test_into_a_pipeline(pipeline: Path, peer: Path, tmp_path: Path):
    """The file takes the transformer's place; the rest is copied; generate needs nothing more."""
    out = tmp_path / "out"
    assert convert(peer, out, "--into", pipeline) == 0
    assert files_in(out) == files_in(pipeline)
    assert not differences(stored(pipeline / "transformer"), stored(out / "transformer"))
    for file in files_in(pipeline):
        if not file.startswith("transformer") and (pipeline / file).is_file():
            assert (out / file).read_bytes() == (pipeline / file).read_bytes()


def test_whole_pipelines(pipeline: Path, tmp_path: Path):
    assert convert(pipeline, tmp_path / "lite", "--to", "nunchaku_lite") == 0
    assert type(nq.load(tmp_path / "lite")).__name__ == "FluxPipeline"
    assert convert(tmp_path / "lite", tmp_path / "ours") == 0
    assert not list(tmp_path.glob("*.partial"))


def test_outputs_that_are_there(peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert "exists already" in refused(capsys, peer, out) and out.read_bytes() == b"mine"
    assert convert(peer, out, "--overwrite") == 0 and nq.load(out)


@pytest.mark.parametrize("argv, match", [
    (("{peer}", "{tmp}/folder", "--to", "nunchaku"), "one file; name one that ends in .safetensors"),
    (("{peer}", "{tmp}/a.safetensors", "--to", "nunchaku_lite"), "a folder, not a file"),
    (("{pipe}", "{tmp}/a.safetensors"), "a pipeline becomes a folder"),
    (("{peer}", "{tmp}/a", "--into", "{pipe}/vae"), "is no pipeline folder"),
    (("{tmp}/none", "{tmp}/a"), "no such file or folder"),
    (("{pipe}/vae", "{tmp}/a"), "has no quantization_config"),
    (("{peer}", "{peer}", "--overwrite"), "would replace the model it is made from"),
])
def test_what_is_refused(argv: tuple, match: str, pipeline: Path, peer: Path, tmp_path: Path,
                         capsys: pytest.CaptureFixture):
    places = {"peer": peer, "pipe": pipeline, "tmp": tmp_path}
    assert match in refused(capsys, *(arg.format(**places) for arg in argv))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_leaves_nothing(peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "cut.safetensors").write_bytes(peer.read_bytes()[:-100])
    assert "cut short" in refused(capsys, tmp_path / "cut.safetensors", tmp_path / "out")
    assert files_in(tmp_path) == ["cut.safetensors"]


def test_interrupted_while_writing(pipeline: Path, tmp_path: Path):
    """Ctrl-C leaves what was there."""
    script = f"""
import os, signal
import nunchaku_py.checkpoint.nunchaku.write as write
packed = write.Writer._packed
def stop(self, item):
    if item.name.startswith("single"): os.kill(os.getpid(), signal.SIGINT)
    return packed(self, item)
write.Writer._packed = stop
from nunchaku_py.cli import main
raise SystemExit(main(["convert", {str(pipeline / "transformer")!r}, {str(tmp_path / "a.safetensors")!r},
                       "--to", "nunchaku", "--overwrite"]))
"""
    (tmp_path / "a.safetensors").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                          cwd=Path(cli.__file__).parents[1], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert files_in(tmp_path) == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == b"old"


def test_inspect(pipeline: Path, peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["inspect", str(peer)]) == 0
    said = capsys.readouterr().out
    assert "NunchakuFluxTransformer2dModel" in said and "(svdquant int4)" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["2", "transformer_blocks.*.qkv_proj", "w4a4", "int4", "g64", "16", "384", "128"] in [r[:8] for r in rows]
    assert "quantized: 30 packed linears" in said
    assert convert(pipeline / "transformer", tmp_path / "lite", "--to", "nunchaku_lite") == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "lite"), "--all"]) == 0
    assert "single_transformer_blocks.1.proj_out" in capsys.readouterr().out
