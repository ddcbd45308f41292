"""Models quantized block by block from their files: the same bytes as in memory, a block in memory at a time."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nunchaku_py as nq
from nunchaku_py import cli
from nunchaku_py.calibrate import State
from nunchaku_py.errors import NunchakuError
from nunchaku_py.quantize import Settings
from nunchaku_py.recipes import RECIPES
from nunchaku_py.stream import files, write
from nunchaku_py.stream.files import Calibration, NotStreamable, Opening, quantize_files
from nunchaku_py.stream.residence import Streamed
from nunchaku_py.stream.run import StreamedRun
from tests.checks import QUICK, files_in
from tests.tiny import MODELS
from tests.tiny_pipelines import flux_prompt
from tests.tiny_text import TEXT_ENCODERS

BF16 = torch.bfloat16
SMALL = {"height": 16, "width": 16, "num_inference_steps": 3}
PROMPTS = [{"prompt": "a cat", **SMALL}, {"prompt": "two dogs", **SMALL, "num_inference_steps": 4}]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny FLUX transformer; tests do not change it."""
    folder = tmp_path_factory.mktemp("models") / "flux"
    MODELS["flux"]()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    flux_prompt()[0].save_pretrained(folder)
    return folder


def run(folder: Path, work: Path, recipe: Any = QUICK, **settings: Any) -> StreamedRun:
    runs, _ = quantize_files({"": Opening(BF16).one("", folder)}, {"": recipe}, Settings(**settings), work)
    return runs[""]


def same_files(a: Path, b: Path) -> None:
    assert files_in(a) == files_in(b) != []
    for name in files_in(a):
        assert (a / name).is_dir() or (a / name).read_bytes() == (b / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------- the same as in memory
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_bytes_of_every_architecture_are_those_of_quantizing_in_memory(name: str, tmp_path: Path) -> None:
    model, _ = MODELS[name]()
    model.save_pretrained(tmp_path / "plain")
    files.write(run(tmp_path / "plain", tmp_path / "work"), tmp_path / "streamed")
    whole = type(model).from_pretrained(tmp_path / "plain", torch_dtype=BF16)
    nq.quantize(whole, QUICK)
    nq.save(whole, tmp_path / "whole")
    same_files(tmp_path / "whole", tmp_path / "streamed")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(TEXT_ENCODERS))
def test_text_encoders_in_another_type_than_their_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of which transformers keeps parts in fp32, and notes the type in the config."""
    model, _ = TEXT_ENCODERS[name]()
    model.save_pretrained(tmp_path / "plain")
    recipe = RECIPES["w4a16-int4"]
    home = {"": Opening(dtype).one("", tmp_path / "plain")}
    runs, _ = quantize_files(home, {"": recipe}, Settings(), tmp_path / "work")
    whole = type(model).from_pretrained(tmp_path / "plain", dtype=dtype)
    nq.quantize(whole, recipe)
    for form in ("", ".safetensors"):
        files.write(runs[""], tmp_path / f"made/streamed{form}")
        nq.save(whole, tmp_path / f"made/whole{form}")
    same_files(tmp_path / "made/whole", tmp_path / "made/streamed")
    assert (tmp_path / "made/whole.safetensors").read_bytes() == (tmp_path / "made/streamed.safetensors").read_bytes()


def test_one_file(flux: Path, tmp_path: Path) -> None:
    done = run(flux, tmp_path / "work", RECIPES["rtn-nvfp4"])
    files.write(done, tmp_path / "streamed.safetensors")
    whole = MODELS["flux"]()[0]
    nq.quantize(whole, "rtn-nvfp4")
    nq.save(whole, tmp_path / "whole.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "streamed.safetensors").read_bytes()


def calibrated(pipeline: Path, names: dict[str, Any], work: Path, feedback: bool = True, **settings: Any
               ) -> tuple[dict, Any]:
    parts = {part.name: part for part in pipeline.iterdir() if any(part.glob("*.safetensors"))}
    homes = Opening(BF16).all(parts, names, set(parts) - set(names))
    return quantize_files(homes, names, Settings(**settings), work, Calibration(pipeline, BF16, PROMPTS, 5, feedback))


@pytest.mark.parametrize("feedback", [True, False])
def test_calibrated_on_prompts_of_different_lengths(pipeline: Path, tmp_path: Path, feedback: bool) -> None:
    recipe = RECIPES["svdquant-int4"]
    runs, report = calibrated(pipeline, {"transformer": recipe}, tmp_path / "work", feedback)
    files.write(runs["transformer"], tmp_path / "streamed")
    pipe = flux_prompt()[0]
    expected = nq.quantize(pipe, recipe, PROMPTS, states=5, feedback=feedback)
    nq.save(pipe.transformer, tmp_path / "whole")
    same_files(tmp_path / "whole", tmp_path / "streamed")
    assert [row.errors for row in report.rows] == [row.errors for row in expected.rows]


def test_a_text_encoder_beside_the_denoiser(pipeline: Path, tmp_path: Path) -> None:
    names = {"transformer": QUICK, "text_encoder_2": RECIPES["w4a16-int4"]}
    runs, _ = calibrated(pipeline, names, tmp_path / "work")
    pipe = flux_prompt()[0]
    nq.quantize(pipe, QUICK, PROMPTS, states=5, components=names)
    for name in names:
        files.write(runs[name], tmp_path / "streamed" / name)
        nq.save(getattr(pipe, name), tmp_path / "whole" / name)
        same_files(tmp_path / "whole" / name, tmp_path / "streamed" / name)


def test_a_unet_with_guidance(tmp_path: Path) -> None:
    """Two rows in each forward, and blocks that lie in three lists."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star")
    command = ["quantize", "tiny-sdxl", "--recipe", "rtn-int4", "--states", "3", "--prompts",
               str(tmp_path / "prompts.txt")]
    for out, more in (("streamed", []), ("whole", ["--in-memory"])):
        assert cli.main([command[0], command[1], str(tmp_path / out), *command[2:], *more]) == 0
    same_files(tmp_path / "whole/unet", tmp_path / "streamed/unet")


# --------------------------------------------------------------------------------------------------- what is in memory
def held(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


def test_one_block_at_a_time_is_in_memory(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}
    whole = StreamedRun.quantize_block

    def watched(self: StreamedRun, block: str, stats: Any) -> Any:
        seen[block] = held(self.model)
        return whole(self, block, stats)

    monkeypatch.setattr(StreamedRun, "quantize_block", watched)
    done = run(flux, tmp_path / "work")
    assert len(seen) == len(done.blocks) > 2
    for block, names in seen.items():
        assert names and all(name.startswith(f"{block}.") for name in names)
    assert not held(done.model) and not any(held(module) for module in done.originals.values())


def test_blocks_that_a_rule_keeps_are_not_in_memory_either(pipeline: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    kept, seen = "transformer_blocks.0.", []
    whole = StreamedRun.quantize_block

    def watched(self: StreamedRun, block: str, stats: Any) -> Any:
        seen.append(held(self.model))
        return whole(self, block, stats)

    monkeypatch.setattr(StreamedRun, "quantize_block", watched)
    rules = {f"{kept}*": "keep"}
    runs, _ = calibrated(pipeline, {"transformer": QUICK}, tmp_path / "work", rules=rules)
    assert seen and not any(name.startswith(kept) for names in seen for name in names)
    files.write(runs["transformer"], tmp_path / "streamed")
    pipe = flux_prompt()[0]
    nq.quantize(pipe, QUICK, PROMPTS, states=5, rules=rules)
    nq.save(pipe.transformer, tmp_path / "whole")
    same_files(tmp_path / "whole", tmp_path / "streamed")


def test_text_encoders_give_their_memory_to_the_denoiser(pipeline: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []
    whole, homes = Streamed.of, {}

    def watched(self: Streamed, name: str) -> Any:
        loaded.append((type(self.model).__name__, name))
        if "Flux" in type(self.model).__name__:
            for other in homes.values():
                assert other.model is self.model or not held(other.model)
        return whole(self, name)

    monkeypatch.setattr(Streamed, "of", watched)
    parts = {part.name: part for part in pipeline.iterdir() if any(part.glob("*.safetensors"))}
    homes |= Opening(BF16).all(parts, ["transformer"], set(parts) - {"transformer"})
    calibration = Calibration(pipeline, BF16, PROMPTS, 4)
    quantize_files(homes, {"transformer": QUICK}, Settings(), tmp_path / "work", calibration)
    blocks = len(homes["transformer"].blocks)
    encoders = [entry for entry in loaded if "Flux" not in entry[0]]
    assert len(encoders) == len(homes["text_encoder"].blocks) + len(homes["text_encoder_2"].blocks), "once for all"
    denoising = len(loaded) - len(encoders)
    assert denoising == (4 + 1 + 1) * blocks, "four steps, the order of the first state, and the replay"
    assert not any(held(home.model) for home in homes.values())


# --------------------------------------------------------------------------------------------------------- interrupted
def killed(arguments: list[str], after: float) -> None:
    """The command, ended by SIGKILL after so many seconds, or earlier by itself."""
    process = subprocess.Popen([sys.executable, "-m", "nunchaku_py", *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_random_moments_and_resumed_the_files_are_identical(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(map(json.dumps, PROMPTS)))

    def command(out: str) -> list[str]:
        return ["quantize", str(pipeline), str(tmp_path / out), "--states", "4", "--prompts",
                str(tmp_path / "prompts.txt")]

    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "nunchaku_py", *command("whole")], check=True, stdout=subprocess.DEVNULL)
    took, moments = time.monotonic() - started, random.Random()
    for _ in range(3):
        killed(command("out"), moments.uniform(0.3, 0.95) * took)
    if not (tmp_path / "out").exists():
        subprocess.run([sys.executable, "-m", "nunchaku_py", *command("out")], check=True, stdout=subprocess.DEVNULL)
    for folder in ("whole", "out"):
        for report in (tmp_path / folder).glob("report.*"):  # they tell how long it took
            report.unlink()
    same_files(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_block_whose_bytes_changed_is_done_again(flux: Path, tmp_path: Path) -> None:
    files.write(run(flux, tmp_path / "work"), tmp_path / "first")
    block = sorted((tmp_path / "work").glob("*.safetensors"))[0]
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    files.write(run(flux, tmp_path / "work"), tmp_path / "second")
    same_files(tmp_path / "first", tmp_path / "second")


def test_states_are_found_once(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated(pipeline, {"transformer": QUICK}, tmp_path / "work")
    monkeypatch.setattr(files, "StreamedPipeline", None)
    calibrated(pipeline, {"transformer": QUICK}, tmp_path / "work")
    (tmp_path / "work/states.pt").write_bytes(b"cut short")
    with pytest.raises(TypeError):  # looked for again
        calibrated(pipeline, {"transformer": QUICK}, tmp_path / "work")


# ----------------------------------------------------------------------------------------------------------- the files
def test_shards_in_and_out(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MODELS["flux"]()[0].save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    files.write(run(flux, tmp_path / "a"), tmp_path / "one")
    done = run(tmp_path / "sharded", tmp_path / "b")
    files.write(done, tmp_path / "two")
    same_files(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(write, "SHARD", 60_000)
    files.write(done, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, shards = nq.load(tmp_path / "one").state_dict(), nq.load(tmp_path / "shards").state_dict()
    assert one.keys() == shards.keys() and all(torch.equal(one[name], shards[name]) for name in one)


def changed(flux: Path, to: Path, change: Any) -> Path:
    shutil.copytree(flux, to)
    file = next(to.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return to


def test_damaged_models_are_refused_in_a_sentence(flux: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.1.attn.to_q.weight"
    lacking = changed(flux, tmp_path / "lacking", lambda tensors: tensors.pop(name))
    with pytest.raises(NunchakuError, match=f"1 tensors of FluxTransformer2DModel are missing: {name}"):
        Opening(BF16).one("", lacking)
    with pytest.raises(NunchakuError, match=r"transformer_blocks.1.attn.to_q.weight: expected \(\d+, \d+\), got"):
        Opening(BF16).one("", changed(flux, tmp_path / "shape", lambda t: t.update({name: torch.zeros(3, 5)})))
    with pytest.raises(NunchakuError, match="attn.to_q.weight: expected one of BF16, F16, F32, got I8"):
        Opening(BF16).one("", changed(flux, tmp_path / "int8", lambda t: t.update({name: t[name].to(torch.int8)})))
    nan = changed(flux, tmp_path / "nan", lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(NunchakuError, match="to_q.weight: holds NaN or infinite"):
        run(nan, tmp_path / "work")
    assert list((tmp_path / "work").glob("transformer_blocks.0*")), "what was finished before is kept"


def test_buffers_are_those_of_the_file(tmp_path: Path) -> None:
    name = "pos_embed.pos_embed"  # which the model would compute otherwise
    MODELS["sd3"]()[0].save_pretrained(tmp_path / "plain")
    folder = changed(tmp_path / "plain", tmp_path / "model", lambda tensors: tensors[name].fill_(0.5))
    files.write(run(folder, tmp_path / "work"), tmp_path / "done")
    assert (load_file(next((tmp_path / "done").glob("*.safetensors")))[name] == 0.5).all()


def test_text_encoders_that_cannot_be_streamed_are_told(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "pipe")
    file = next((tmp_path / "pipe/text_encoder").glob("*.safetensors"))
    save_file({f"a.b.{name}": tensor for name, tensor in load_file(file).items()}, file)
    parts, said = {"text_encoder": tmp_path / "pipe/text_encoder"}, []
    assert Opening(BF16, say=said.append).all(parts, [], parts) == {}
    assert "names that only CLIPTextModel itself understands: it is read into memory as a whole" in said[0]
    with pytest.raises(NunchakuError, match="for which there is no --budget"):
        Opening(BF16, whole=False).all(parts, [], parts)


def test_a_quantized_folder_is_refused(flux: Path, tmp_path: Path) -> None:
    files.write(run(flux, tmp_path / "work"), tmp_path / "done")
    with pytest.raises(NunchakuError, match="already quantized"):
        Opening(BF16).one("", tmp_path / "done")


def test_pickled_weights_are_no_stream(flux: Path, tmp_path: Path) -> None:
    shutil.copytree(flux, tmp_path / "bin")
    next((tmp_path / "bin").glob("*.safetensors")).rename(tmp_path / "bin/diffusion_pytorch_model.bin")
    with pytest.raises(NotStreamable, match="not in safetensors"):
        Opening(BF16).one("", tmp_path / "bin")


# -------------------------------------------------------------------------------------------------------------- budget
def test_a_budget_below_the_need_is_refused_before_any_work(flux: Path, tmp_path: Path) -> None:
    home = {"": Opening(BF16).one("", flux)}
    with pytest.raises(NunchakuError, match=r"budget of 100.00 MB: quantizing Flux\w+ takes about \d+.\d+ MB"):
        quantize_files(home, {"": QUICK}, Settings(), tmp_path / "work", budget=10**8)
    assert not (tmp_path / "work").exists()
    quantize_files(home, {"": QUICK}, Settings(), tmp_path / "work", budget=10**9)


def test_states_count_in_the_budget(flux: Path, tmp_path: Path) -> None:
    from nunchaku_py.stream.budget import needs_of
    from nunchaku_py.stream.run import streamed_run

    done = streamed_run(Opening(BF16).one("", flux), RECIPES["svdquant-int4"], Settings())
    one = State((), {"hidden_states": torch.zeros(1, 4096, 64, dtype=BF16)})
    totals = [sum(need.nbytes for need in needs_of(done, states)) for states in (None, (), [one], [one] * 8)]
    assert totals == sorted(totals) and len(set(totals)) == 4


# ------------------------------------------------------------------------------------------------------------------ GPU
@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_on_a_gpu_within_a_budget(pipeline: Path, tmp_path: Path, prompts: list | None) -> None:
    """The same blocks as on a CPU but for the last bits of sums; nothing of it stays on the GPU."""
    parts = {part.name: part for part in pipeline.iterdir() if any(part.glob("*.safetensors"))}
    states = None if prompts is None else Calibration(pipeline, BF16, prompts, 4)
    before, made = torch.cuda.memory_allocated(), {}
    for device in ("cuda", "cpu"):
        homes = Opening(BF16, device).all(parts, ["transformer"], set(parts) - {"transformer"})
        runs, report = quantize_files(homes, {"transformer": RECIPES["svdquant-int4"]}, Settings(), tmp_path / device,
                                      states, budget=2 * 10**9)
        files.write(runs["transformer"], tmp_path / f"{device}.safetensors")
        made[device] = [list(row.errors.values())[-1] for row in report.rows]
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() < 2 * 10**9
    assert made["cuda"] == pytest.approx(made["cpu"], rel=0.05)
    nq.load(tmp_path / "cuda.safetensors")
