"""`nunchaku-py convert` and what `inspect` says of packed linears, on a miniature pipeline."""
from __future__ import annotations

import os
import shutil
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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit pipeline; tests do not change it."""
    folder = tmp_path_factory.mktemp("source") / "flux"
    flux_prompt()[0].save_pretrained(folder)
    return folder


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_model_replaces_a_folder_as_a_whole(pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(pipeline, out)
    assert convert(pipeline / "transformer", out) == 1  # without --overwrite nothing happens
    assert contents(out) == contents(pipeline)
    assert convert(pipeline / "transformer", out, "--overwrite") == 0
    assert sorted(contents(out)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_the_old_folder(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    shutil.copytree(pipeline, out)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nunchaku_py.checkpoint.lite_write.write_tensors", full)
    capsys.readouterr()
    assert convert(pipeline / "transformer", out, "--to", "nunchaku_lite", "--overwrite") == 1
    said = capsys.readouterr().err
    assert said == f"nunchaku-py: {out}: cannot be written: [Errno 28] No space left on device\n"
    assert contents(out) == contents(pipeline)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_converted_is_a_sentence(source: Path, pipeline: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    cases = {
        "holds no quantized model": [source, out],
        "no quantization_config of ours": [source / "transformer", out],
        "neither a pipeline (model_index.json) nor a model (config.json)": [empty, out],
        "is a pipeline already; name a model": [pipeline, out, "--into", source],
        "is no pipeline folder": [pipeline / "transformer", out, "--into", source / "transformer"],
    }
    for expected, argv in cases.items():
        capsys.readouterr()
        assert convert(*argv) == 1
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1, said
        assert sorted(file.name for file in tmp_path.iterdir()) == ["empty"]


def test_a_shipped_pipeline_is_known_by_its_name(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert convert("tiny-flux", tmp_path / "out") == 1
    assert "holds no quantized model" in capsys.readouterr().err


def test_inspect_for_is_asked_of_loras_only(source: Path, pipeline: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    for form in ("nunchaku", "nunchaku_py"):
        file = tmp_path / f"{form}.safetensors"
        assert convert(pipeline / "transformer", file, "--to", form) == 0
        capsys.readouterr()
        assert cli.main(["inspect", str(file), "--for", str(source)]) == 1
        assert "is a quantized model, no LoRA file" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["nunchaku", "nunchaku_py", "16 bit"])
def test_a_model_is_no_lora(source: Path, pipeline: Path, tmp_path: Path, form: str) -> None:
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    if form != "16 bit":
        file = tmp_path / "model.safetensors"
        assert convert(pipeline / "transformer", file, "--to", form) == 0
    pipe = nq.load(pipeline)
    before = state_of(pipe.transformer)
    for options in ({}, {"allow_partial": True}):
        with pytest.raises(nq.NunchakuError, match="no LoRA|no key is one of a LoRA"):
            pipe.load_lora_weights(str(file), **options)
    assert not differences(before, state_of(pipe.transformer))
