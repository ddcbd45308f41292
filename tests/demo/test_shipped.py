"""Shipped pipelines by name, on the command line and in Python, and what a folder says it is called with."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from nunchaku_py import NunchakuError, cli
from nunchaku_py.commands import generate
from nunchaku_py.commands.sources import Source
from nunchaku_py.demo import shipped
from nunchaku_py.folders import read_call, write_call
from tests.tiny_pipelines import flux_prompt

pytestmark = pytest.mark.usefixtures("stand_in")
PROMPT = ("--prompt", "a red circle")


def run(*argv: object) -> None:
    assert cli.main([str(arg) for arg in argv]) == 0


@pytest.mark.parametrize("name", shipped.CALLS)
def test_pipelines_load_in_the_asked_dtype(name: str):
    assert shipped.pipeline(name).dtype == torch.bfloat16
    assert shipped.pipeline(name, torch.float16).dtype == torch.float16


def test_an_unknown_name_is_refused():
    with pytest.raises(NunchakuError, match="no shipped pipeline is called 'flux'; there are tiny-flux and tiny-sdxl"):
        shipped.pipeline("flux")


@pytest.mark.parametrize("name", shipped.CALLS)
def test_generate_takes_the_name_and_calls_it_as_shipped(name: str, tmp_path: Path, monkeypatch):
    calls = []
    whole = generate._call
    monkeypatch.setattr(generate, "_call", lambda pipe, call: calls.append(call) or whole(pipe, call))
    run("generate", name, *PROMPT, "--steps", "1", "--out", tmp_path / "x.png")
    assert {**shipped.CALLS[name], "num_inference_steps": 1}.items() <= calls[0].items()
    assert Image.open(tmp_path / "x.png").size == (64, 64)


def test_guidance_is_the_one_the_pipeline_is_made_for(tmp_path: Path, monkeypatch):
    calls = []
    monkeypatch.setattr(generate, "_call", lambda pipe, call: calls.append(call) or Image.new("RGB", (4, 4)))
    monkeypatch.setattr(generate, "_images", lambda result: [result])
    for name in shipped.CALLS:
        run("generate", name, *PROMPT, "--guidance", "2.5", "--out", tmp_path / "x.png")
    assert calls[0]["true_cfg_scale"] == 2.5 == calls[1]["guidance_scale"] and "guidance_scale" not in calls[0]


def test_a_quantized_copy_remembers_how_it_is_called(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text('a red circle\n{"prompt": "a blue star", "num_inference_steps": 1}\n')
    run("quantize", "tiny-flux", tmp_path / "out", "--recipe", "rtn-int4", "--prompts", tmp_path / "prompts.txt",
        "--states", "2")
    assert json.loads((tmp_path / "out/generate.json").read_text()) == shipped.CALLS["tiny-flux"]
    run("generate", tmp_path / "out", *PROMPT, "--steps", "1", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (64, 64)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("inspect", "tiny-flux")
    assert "FluxPipeline" in capsys.readouterr().out
    (tmp_path / "tiny-flux").mkdir()
    assert cli.main(["inspect", "tiny-flux"]) == 1
    assert "holds neither a pipeline" in capsys.readouterr().err


def test_a_shipped_folder_is_called_as_shipped_however_it_is_named(stand_in: Path, monkeypatch):
    monkeypatch.chdir(stand_in.parent)
    assert Source.of(Path(stand_in.name) / "tiny-flux").call == shipped.CALLS["tiny-flux"]


@pytest.mark.parametrize("command", [("generate", *PROMPT), ("quantize", "out"), ("inspect",)])
def test_missing_weights_are_a_sentence(command: tuple[str, ...], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    for prepare in (lambda: None, (tmp_path / "tiny-flux").mkdir):
        prepare()
        assert cli.main([command[0], "tiny-flux", *command[1:]]) == 1
        assert capsys.readouterr().err == (f"nunchaku-py: {tmp_path}/tiny-flux: the shipped weights are missing; "
                                           "reinstall nunchaku-py\n")


def test_a_recommended_argument_the_pipeline_does_not_take_is_refused(weights: Path, tmp_path: Path, capsys):
    run("quantize", "tiny-flux", tmp_path / "out", "--recipe", "rtn-int4")
    (tmp_path / "out/generate.json").write_text('{"colour": "red"}')
    assert cli.main(["generate", str(tmp_path / "out"), *PROMPT, "--out", str(tmp_path / "x.png")]) == 1
    assert "colour: FluxPipeline takes no colour" in capsys.readouterr().err


@pytest.mark.parametrize(("call", "said"), [
    ('["height", 64]', "expected a JSON object, got list"),
    ('{"num_inference_steps": "many"}', 'num_inference_steps: expected a whole number above 0, got "many"'),
    ('{"height": [64]}', "height: expected a whole number above 0, got [64]"),
    ('{"width": 0}', "width: expected a whole number above 0, got 0"),
    ('{"num_images_per_prompt": true}', "num_images_per_prompt: expected a whole number above 0, got true"),
    ('{"guidance_scale": null}', "guidance_scale: expected a number, got null"),
    ('{"true_cfg_scale": "3"}', 'true_cfg_scale: expected a number, got "3"'),
    ('{"negative_prompt": 5}', "negative_prompt: expected a text, got 5"),
])
def test_wrong_recommendations_are_sentences(call: str, said: str, stand_in: Path, tmp_path: Path, capsys):
    folder = shutil.copytree(stand_in / "tiny-flux", tmp_path / "flux")
    (folder / "generate.json").write_text(call)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    for command in (["generate", folder, *PROMPT, "--out", tmp_path / "x.png"],
                    ["quantize", folder, tmp_path / "out", "--prompts", tmp_path / "prompts.txt"]):
        assert cli.main([str(word) for word in command]) == 1
        assert capsys.readouterr().err == f"nunchaku-py: {folder}/generate.json: {said}\n"


def test_recommendations_of_the_right_kind_are_read(tmp_path: Path):
    call = {**shipped.CALLS["tiny-flux"], "guidance_scale": 3, "negative_prompt_2": "", "sigmas": [1.0, 0.5]}
    write_call(tmp_path, call)
    assert read_call(tmp_path) == call and read_call(tmp_path / "none") == {}


def test_prompts_are_no_longer_than_the_tokenizers_know():
    pipe = flux_prompt()[0]
    known = inspect.signature(pipe.__call__).parameters
    longest = pipe.tokenizer.model_max_length
    assert longest > pipe.tokenizer_2.model_max_length
    assert generate.longest_prompt(pipe, known) == {"max_sequence_length": longest}
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 10**30  # none: how transformers says so
    assert generate.longest_prompt(pipe, known) == {}
    assert generate.longest_prompt(pipe, {}) == {}
