"""Pipelines that run block by block on empty models: what they may differ in, and what is kept of them for later."""
from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import cli
from nunchaku_py.calibrate import State
from nunchaku_py.errors import NunchakuError
from nunchaku_py.quantize import Settings
from nunchaku_py.recipes import RECIPES
from nunchaku_py.stream import files
from nunchaku_py.stream.files import Calibration, Opening, quantize_files
from nunchaku_py.stream.pipeline import _with_own_state
from tests import tiny_text
from tests.checks import files_in
from tests.tiny_models import TEXT_DIM, randomise
from tests.tiny_pipelines import flux_prompt

BF16, FAST = torch.bfloat16, RECIPES["rtn-int4"]
SMALL = {"height": 16, "width": 16, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    flux_prompt()[0].save_pretrained(folder)
    return folder


def check_same_as_in_memory(folder: Path, cls: Any, names: list[str], prompts: list[dict], tmp_path: Path) -> None:
    parts = {part.name: part for part in folder.iterdir() if any(part.glob("*.safetensors"))}
    homes = Opening(BF16).all(parts, names, set(parts) - set(names))
    runs, _ = quantize_files(homes, dict.fromkeys(names, FAST), Settings(), tmp_path / "work",
                             Calibration(folder, BF16, prompts, 4))
    pipe = cls.from_pretrained(folder, torch_dtype=BF16)
    nq.quantize(pipe, FAST, prompts, states=4, components=names)
    for name in names:
        files.write(runs[name], tmp_path / "streamed" / name)
        nq.save(getattr(pipe, name), tmp_path / "whole" / name)
    made = files_in(tmp_path / "whole")
    assert made and made == files_in(tmp_path / "streamed")
    for file in (file for file in made if (tmp_path / "whole" / file).is_file()):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "streamed" / file).read_bytes(), file


def test_prompts_with_and_without_guidance(flux: Path, tmp_path: Path) -> None:
    """The text encoders run once for one and twice for the other, and are there until the last is through."""
    from diffusers import FluxPipeline

    prompts = [{"prompt": "a cat", **SMALL},
               {"prompt": "two dogs", "negative_prompt": "bad", "true_cfg_scale": 3.0, **SMALL}]
    check_same_as_in_memory(flux, FluxPipeline, ["transformer"], prompts, tmp_path)


def test_every_prompt_has_schedulers_of_its_own() -> None:
    """Whatever they are called; the models are the same."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = flux_prompt()[0]
    parts = {"scheduler": pipe.scheduler, "prior_scheduler": FlowMatchEulerDiscreteScheduler(),
             "transformer": pipe.transformer, "tokenizer": pipe.tokenizer}
    own = _with_own_state(SimpleNamespace(components=parts, **parts))
    assert {name for name, part in parts.items() if getattr(own, name) is not part} == {"scheduler", "prior_scheduler"}


def wan_transformer(seed: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return randomise(WanTransformer3DModel(num_attention_heads=2, attention_head_dim=48, text_dim=TEXT_DIM,
                                           freq_dim=64, ffn_dim=128, num_layers=1, rope_max_seq_len=32), seed)


def test_two_denoisers_that_the_pipeline_could_do_without(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    text = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=32, d_ff=64, num_layers=1, num_heads=2))
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    pipe = WanPipeline(tiny_text.t5_tokenizer(), randomise(text, 3), vae, FlowMatchEulerDiscreteScheduler(shift=3.0),
                       wan_transformer(0), wan_transformer(1), boundary_ratio=0.8)
    pipe.save_pretrained(tmp_path / "pipe")
    prompts = [{"prompt": "a cat", "height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4,
                "max_sequence_length": 8}]
    check_same_as_in_memory(tmp_path / "pipe", WanPipeline, ["transformer", "transformer_2"], prompts, tmp_path)


# ------------------------------------------------------------------------------------------------------- states on disk
def test_states_that_cannot_be_pickled_are_not_kept(tmp_path: Path) -> None:
    files._keep({"": [State((), {"function": lambda: None})]}, tmp_path / "states.pt")
    assert not list(tmp_path.iterdir())


def test_a_disk_too_full_for_states_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_held: Any, path: Path) -> None:
        path.write_bytes(b"cut short")
        raise RuntimeError("unexpected pos 704 vs 598")  # as torch says it

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NunchakuError, match="states.pt: cannot be written"):
        files._keep({"": [State((), {})]}, tmp_path / "states.pt")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interrupted(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that was stopped when it had calibration states, and no block."""
    (tmp_path / "prompts.txt").write_text(json.dumps({"prompt": "a cat", **SMALL}))
    command = ["quantize", str(flux), str(tmp_path / "out"), "--recipe", "rtn-int4", "--states", "2", "--prompts",
               str(tmp_path / "prompts.txt")]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.StreamedRun, "quantize_block", stop)
        assert cli.main(command) == 130
    assert (tmp_path / "out.partial/blocks/states.pt").exists()
    return command


def other_prompt(prompts: Path, _flux: Path) -> list[str]:
    prompts.write_text(json.dumps({"prompt": "two dogs", **SMALL}))
    return []


def other_weights(_prompts: Path, flux: Path) -> list[str]:
    file = next((flux / "text_encoder").glob("*.safetensors"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    return []


CHANGES = {"prompt": other_prompt, "weights": other_weights, "count": lambda *_: ["--states", "3"],
           "seed": lambda *_: ["--seed", "7"]}


@pytest.mark.parametrize("change", CHANGES)
def test_states_of_another_command_are_not_used(change: str, interrupted: list[str], flux: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    more = CHANGES[change](tmp_path / "prompts.txt", flux)
    capsys.readouterr()
    assert cli.main([*interrupted, *more]) == 1
    assert "holds the unfinished work of another command" in capsys.readouterr().err
    assert (tmp_path / "out.partial/blocks/states.pt").exists()
