"""`nunchaku-py quantize` with what community fine-tunes come as: one file, LoRAs, a pipeline that lends the rest."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nunchaku_py import cli
from nunchaku_py.demo import shipped
from tests.checks import files_in
from tests.stream import makers

FAST = ("--recipe", "rtn-int4")
LORA = "tiny-flux-neon"


@pytest.fixture(scope="module")
def flux() -> Path:
    return shipped.folder("tiny-flux")


@pytest.fixture(scope="module")
def single(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped transformer in one file with ComfyUI's prefix: BFL's names diffusers converts at FLUX's size only."""
    state = load_file(next((flux / "transformer").glob("*.safetensors")))
    file = tmp_path_factory.mktemp("files") / "fine-tune.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in makers.prefixed(state).items()}, file)
    return file


@pytest.fixture(scope="module")
def others(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder whose tensors have names that are not those of its class."""
    folder = tmp_path_factory.mktemp("models") / "text_encoder"
    shutil.copytree(flux / "text_encoder", folder)
    file = next(folder.glob("*.safetensors"))
    save_file({f"a.b.{name}": tensor for name, tensor in load_file(file).items()}, file)
    return folder


def run(*argv: Any) -> None:
    assert cli.main([str(arg) for arg in argv]) == 0


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture) -> Any:
    def check(*argv: Any) -> str:
        code = cli.main([str(arg) for arg in argv])
        said = capsys.readouterr().err
        assert code == 1 and said.startswith("nunchaku-py: ") and said.count("\n") == 1, said
        return said

    return check


def same(a: Path, b: Path) -> None:
    assert a.read_bytes() == b.read_bytes(), f"{a} {b}"


def prompts(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text(json.dumps({"prompt": "a red circle", "num_inference_steps": 2}))
    return ["--prompts", str(tmp_path / "prompts.txt"), "--states", "2"]


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_a_file_in_a_pipeline_is_that_pipeline_quantized(flux: Path, single: Path, tmp_path: Path) -> None:
    data = prompts(tmp_path)
    run("quantize", flux, tmp_path / "expected", *FAST, *data)
    run("quantize", single, tmp_path / "out", "--into", flux, *FAST, *data)
    same(tmp_path / "expected" / WEIGHTS, tmp_path / "out" / WEIGHTS)
    assert files_in(tmp_path / "expected") == files_in(tmp_path / "out")


def test_a_file_alone_becomes_a_model(flux: Path, single: Path, tmp_path: Path) -> None:
    run("quantize", flux, tmp_path / "expected", *FAST)
    run("quantize", single, tmp_path / "out", "--config", flux, *FAST)
    same(tmp_path / "expected" / WEIGHTS, tmp_path / "out" / Path(WEIGHTS).name)
    run("quantize", single, tmp_path / "out.safetensors", "--config", flux / "transformer", *FAST)
    made = load_file(tmp_path / "out.safetensors")
    assert made.keys() == load_file(tmp_path / "out" / Path(WEIGHTS).name).keys()


def test_a_lora_is_in_the_weights_that_are_quantized(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(flux, torch_dtype=torch.bfloat16)
    pipe.load_lora_weights(str(shipped.lora(LORA)), adapter_name="neon")
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "fused")
    run("quantize", tmp_path / "fused", tmp_path / "expected", *FAST)
    capsys.readouterr()
    run("quantize", flux, tmp_path / "out", *FAST, "--lora", f"{LORA}:0.5")
    assert "modules at strength 0.5" in capsys.readouterr().out
    found, expected = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "expected" / Path(WEIGHTS).name)
    run("quantize", flux, tmp_path / "plain", *FAST)
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    changed = [name for name in expected if name.endswith(".codes") and not torch.equal(expected[name], plain[name])]
    assert changed
    for name in changed:  # where W + ΔW is rounded once here and twice there, a code may differ
        assert (found[name] != expected[name]).float().mean() < 0.05 * (plain[name] != expected[name]).float().mean()


@pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
def test_a_file_is_quantized_in_its_own_type(suffix: str, flux: Path, single: Path, tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(single).items()}, tmp_path / f"half{suffix}")
    run("quantize", tmp_path / f"half{suffix}", tmp_path / "out", "--config", flux, *FAST)
    made = load_file(tmp_path / "out" / Path(WEIGHTS).name)
    assert torch.bfloat16 not in {tensor.dtype for tensor in made.values()}


def test_a_model_read_as_a_whole_must_be_whole(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(flux / "transformer", tmp_path / "model")
    file, name = next((tmp_path / "model").glob("*.safetensors")), "x_embedder.weight"
    tensors = load_file(file)
    save_file({f"another.{key}" if key == name else key: tensor for key, tensor in tensors.items()}, file)
    assert cli.main(["quantize", str(tmp_path / "model"), str(tmp_path / "out"), *FAST]) == 1
    assert f"1 tensors of FluxTransformer2DModel are missing: {name}" in capsys.readouterr().err


def test_a_disk_too_full_for_copies_is_told_in_a_sentence(flux: Path, tmp_path: Path, refuses: Any,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device"), ("c", "d", "the same")])

    monkeypatch.setattr(shutil, "copytree", full)
    assert "out: cannot be written: [Errno 28] No space left on device\n" in refuses("quantize", flux, tmp_path / "out",
                                                                                   *FAST)


def test_a_damaged_part_is_refused_even_if_it_is_only_copied(flux: Path, tmp_path: Path, refuses: Any) -> None:
    shutil.copytree(flux, tmp_path / "pipe")
    file = next((tmp_path / "pipe/vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    assert "cut short" in refuses("quantize", tmp_path / "pipe", tmp_path / "out", *FAST)


MISTAKES = {
    "pickle": (["{tmp}/model.ckpt", "{tmp}/o"], "is a pickle"),
    "lora as a model": (["{lora}", "{tmp}/o"], "is a LoRA, no model"),
    "config of a folder": (["{flux}", "{tmp}/o", "--config", "{flux}"], "a config of its own"),
    "into a model": (["{single}", "{tmp}/o", "--into", "{flux}/transformer"], "is no pipeline folder"),
    "a pipeline into one": (["{flux}", "{tmp}/o", "--into", "{flux}"], "is a pipeline already"),
    "prompts of a file": (["{single}", "{tmp}/o", "--prompts", "{tmp}/none.txt"], "--into PIPELINE_DIR names one"),
    "in memory": (["{single}", "{tmp}/o", "--in-memory"], "only whole folders"),
    "lora in memory": (["{flux}", "{tmp}/o", "--in-memory", "--lora", "{lora}"], "without --lora"),
    "a model as a lora": (["{flux}", "{tmp}/o", "--lora", "{single}"], "fine-tune.safetensors"),
    "a component without the file": (["{single}", "{tmp}/o", "--into", "{flux}", "--component", "text_encoder"],
                                     "is to be the transformer, which --component leaves out"),
    "a text encoder as a denoiser": (["{flux}/text_encoder", "{tmp}/o", "--into", "{flux}"],
                                     "is a FluxTransformer2DModel, and"),
    "lora of a text encoder": (["{flux}", "{tmp}/o", "--component", "text_encoder", "--lora", "{lora}"],
                               "fused into a denoiser"),
    "a budget and names of others": (["{others}", "{tmp}/o", "--budget", "8GB"], "so --budget"),
    "over the file": (["{single}", "{single}", "--into", "{flux}", "--overwrite"], "would replace the model"),
    "over its folder": (["{single}", "{single}/..", "--into", "{flux}", "--overwrite"], "would replace the model"),
    "budget": (["{flux}", "{tmp}/o", "--budget", "a lot"], "--budget: expected a size"),
    "too small a budget": (["{flux}", "{tmp}/o", "--budget", "100MB"], "takes about"),
    "missing": (["{tmp}/absent.gguf", "{tmp}/o"], "no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, flux: Path, single: Path, others: Path, tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    argv, expected = MISTAKES[name]
    filled = [arg.format(tmp=tmp_path, flux=flux, single=single, lora=shipped.lora(LORA), others=others)
              for arg in argv]
    assert expected in refuses("quantize", *filled, *FAST)
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]
