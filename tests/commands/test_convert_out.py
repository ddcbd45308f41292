"""`nunchaku-py convert`: what becomes of OUT, and what it says of an IN that cannot be converted."""

import shutil
from pathlib import Path

import pytest

import nunchaku_py as nq
from nunchaku_py import cli
from tests.checks import differences, state_of
from tests.tiny_pipelines import flux_prompt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit pipeline; tests do not change it."""
    folder = tmp_path_factory.mktemp("source") / "flux"
    flux_prompt()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    out = source.parent / "quantized"
    assert cli.main(["quantize", str(source), str(out), "--recipe", "rtn-int4"]) == 0
    return out


def run(*argv: object) -> int:
    return cli.main(["convert", *(str(arg) for arg in argv)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_model_replaces_a_folder_as_a_whole(quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized, out)
    assert run(quantized / "transformer", out) == 1  # without --overwrite nothing happens
    assert contents(out) == contents(quantized)
    assert run(quantized / "transformer", out, "--overwrite") == 0
    assert sorted(contents(out)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_the_old_folder(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized, out)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nunchaku_py.checkpoint.lite_write.write_tensors", full)
    capsys.readouterr()
    assert run(quantized / "transformer", out, "--to", "nunchaku_lite", "--overwrite") == 1
    said = capsys.readouterr().err
    assert said == f"nunchaku-py: {out}: cannot be written: [Errno 28] No space left on device\n"
    assert contents(out) == contents(quantized)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_converted_is_a_sentence(source: Path, quantized: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    cases = {
        "holds no quantized model": [source, out],
        "no quantization_config of ours": [source / "transformer", out],
        "neither a pipeline (model_index.json) nor a model (config.json)": [empty, out],
        "is a pipeline already; name a model": [quantized, out, "--into", source],
        "is no pipeline folder": [quantized / "transformer", out, "--into", source / "transformer"],
    }
    for expected, argv in cases.items():
        capsys.readouterr()
        assert run(*argv) == 1
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1, said
        assert sorted(file.name for file in tmp_path.iterdir()) == ["empty"]


def test_a_shipped_pipeline_is_known_by_its_name(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run("tiny-flux", tmp_path / "out") == 1
    assert "holds no quantized model" in capsys.readouterr().err


def test_inspect_for_is_asked_of_loras_only(source: Path, quantized: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    for form in ("nunchaku", "nunchaku_py"):
        file = tmp_path / f"{form}.safetensors"
        assert run(quantized / "transformer", file, "--to", form) == 0
        capsys.readouterr()
        assert cli.main(["inspect", str(file), "--for", str(source)]) == 1
        assert "is a quantized model, no LoRA file" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["nunchaku", "nunchaku_py", "16 bit"])
def test_a_model_is_no_lora(source: Path, quantized: Path, tmp_path: Path, form: str) -> None:
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    if form != "16 bit":
        file = tmp_path / "model.safetensors"
        assert run(quantized / "transformer", file, "--to", form) == 0
    pipe = nq.load(quantized)
    before = state_of(pipe.transformer)
    for options in ({}, {"allow_partial": True}):
        with pytest.raises(nq.NunchakuError, match="no LoRA|no key is one of a LoRA"):
            pipe.load_lora_weights(str(file), **options)
    assert not differences(before, state_of(pipe.transformer))
