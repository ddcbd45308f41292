"""The command line: every command on a miniature pipeline, every mistake a sentence, an interruption that resumes."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nunchaku_py import cli, quantize
from nunchaku_py.checkpoint.headers import read_header
from nunchaku_py.commands.arguments import BACKENDS
from nunchaku_py.ops.registry import ORDER
from nunchaku_py.quantize import Run
from tests.tiny_pipelines import flux_prompt

ROOT = Path(cli.__file__).parents[1]
FAST = ("--recipe", "rtn-int4")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit FLUX pipeline folder in miniature; tests do not change it."""
    folder = tmp_path_factory.mktemp("source") / "flux"
    flux_prompt()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(pipeline: Path) -> Path:
    out = pipeline.parent / "quantized"
    assert cli.main(["quantize", str(pipeline), str(out), *FAST]) == 0
    return out


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture):
    """Call it with a command line: exit code 1 and one sentence, which it returns."""

    def check(*argv: object) -> str:
        code = cli.main([str(arg) for arg in argv])
        said = capsys.readouterr().err
        assert code == 1, said
        assert said.startswith("nunchaku-py: ") and said.count("\n") == 1, said
        assert "Traceback" not in said and "unexpected" not in said, said
        return said

    return check


def run(*argv: object) -> None:
    assert cli.main([str(arg) for arg in argv]) == 0


def digests(folder: Path, *suffixes: str) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*")) if file.suffix in suffixes}


# ------------------------------------------------------------------------------------------------------------ the shell
def test_help_imports_no_torch_and_shows_examples():
    code = ("import sys; from nunchaku_py import cli\n"
            "for command in ([], ['info'], ['quantize'], ['inspect'], ['generate'], ['bench'], ['demo'], ['tune']):\n"
            "    try: cli.main([*command, '--help'])\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:") == 8


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "nunchaku_py", "--version"], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("nunchaku-py ")


@pytest.mark.parametrize("argv", [
    [], ["fly"], ["quantize", "only-one"], ["quantize", "a", "b", "--mode", "a5"],
    ["quantize", "a", "b", "--states", "0"],
    ["quantize", "a", "b", "--seed", "9" * 20], ["generate", "a", "--prompt", "x", "--steps", "0"],
    ["tune", "--rows", "0"], ["tune", "--rows", "5,"], ["tune", "--modes", "a5"], ["tune", "--list", "--clear"],
    ["bench"], ["bench", "sdxl", "--modes", "a5"], ["bench", "sdxl", "--width", "8"],
])
def test_wrong_usage_exits_with_two(argv: list[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_debug_shows_the_traceback(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["inspect", str(tmp_path / "absent"), "--debug"])


def test_a_mistake_of_ours_is_a_sentence_too(monkeypatch, capsys):
    def broken(path: Path) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli.inspect, "_file", lambda *args: broken(*args[:1]))
    assert cli.main(["inspect", __file__]) == 1
    assert capsys.readouterr().err == ("nunchaku-py: unexpected ZeroDivisionError: division by zero "
                                       "(a mistake of ours; --debug shows where)\n")


# ----------------------------------------------------------------------------------------------------------------- info
def test_info_names_versions_ops_and_modes(capsys):
    run("info")
    said = capsys.readouterr().out
    for expected in (torch.__version__, "linear_w4a8* (5)", "linear_w4a4* (5)", "quantize_act", "can run",
                     "NUNCHAKU_PY_CUDA", "cpu"):
        assert expected in said
    assert "not known" not in said


def test_info_prints_what_it_can_when_something_is_broken(monkeypatch, capsys):
    monkeypatch.setenv("NUNCHAKU_PY_BACKEND", "abacus")
    run("info")
    said = capsys.readouterr().out
    assert "not known: NunchakuError: backend: expected one of" in said and "default modes" in said


# ------------------------------------------------------------------------------------------------------------- quantize
def test_quantize_writes_a_whole_pipeline(pipeline: Path, quantized: Path):
    from diffusers import FluxPipeline

    config = json.loads((quantized / "transformer/config.json").read_text())
    assert config["quantization_config"]["recipe"] == "rtn-int4"
    assert {"report.txt", "report.json", "report.csv"} <= {file.name for file in quantized.iterdir()}
    for part in ("vae", "text_encoder", "tokenizer_2", "scheduler"):  # untouched parts byte for byte
        assert digests(quantized / part, ".json", ".safetensors") == digests(pipeline / part, ".json", ".safetensors")
    pipe = FluxPipeline.from_pretrained(quantized, torch_dtype=torch.bfloat16)
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q).__name__ == "QuantLinear"
    assert not quantized.with_name("quantized.partial").exists()


def test_quantize_prints_and_writes_the_report(pipeline: Path, tmp_path: Path, capsys):
    run("quantize", pipeline / "transformer", tmp_path / "out", *FAST, "--report", tmp_path / "reports")
    said = capsys.readouterr().out
    assert "linears quantized by rtn-int4" in said and f"written: {tmp_path / 'out'}" in said
    assert (tmp_path / "reports/report.json").read_text() == (tmp_path / "out/report.json").read_text()


def test_quantize_to_one_file(pipeline: Path, tmp_path: Path, capsys):
    import nunchaku_py as nq

    run("quantize", pipeline, tmp_path / "flux.safetensors", "--recipe", "rtn-nvfp4")
    assert nq.load(tmp_path / "flux.safetensors").transformer_blocks[0].attn.to_q.site.format == "nvfp4"
    assert [file.name for file in tmp_path.iterdir()] == ["flux.safetensors"]
    capsys.readouterr()
    run("inspect", tmp_path / "flux.safetensors")
    assert "FluxTransformer2DModel, rtn-nvfp4" in capsys.readouterr().out


def test_rules_rank_and_components(pipeline: Path, tmp_path: Path):
    run("quantize", pipeline, tmp_path / "out", "--rank", "8", "--rule", "*.ff.net.2=keep", "--rule", "*norm*=w4a16",
        "--component", "transformer")
    sites = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]["sites"]
    assert "transformer_blocks.0.ff.net.2" not in sites
    assert sites["transformer_blocks.0.attn.to_q"]["rank"] == 8
    run("quantize", pipeline, tmp_path / "both", "--component", "transformer=rtn-nvfp4", "--component",
        "text_encoder_2=w4a16-int4")
    config = json.loads((tmp_path / "both/text_encoder_2/config.json").read_text())
    assert config["quantization_config"]["recipe"] == "w4a16-int4"


def test_overwrite_replaces_the_folder_as_a_whole(pipeline: Path, tmp_path: Path, refuses):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "exists already" in refuses("quantize", pipeline, out, *FAST)
    assert (out / "mine.txt").exists()
    run("quantize", pipeline, out, *FAST, "--overwrite")
    assert not (out / "mine.txt").exists() and (out / "model_index.json").exists()


def test_float32_folder_is_quantized_in_16_bit(pipeline: Path, tmp_path: Path):
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel.from_pretrained(pipeline / "transformer").save_pretrained(tmp_path / "wide")
    run("quantize", tmp_path / "wide", tmp_path / "out", *FAST)
    run("quantize", tmp_path / "wide", tmp_path / "half", *FAST, "--dtype", "fp16")
    dtypes = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["compute_dtype"]
              for name in ("out", "half")]
    assert dtypes == ["bfloat16", "float16"]


MISTAKES = {
    "missing": (["{tmp}/absent", "{tmp}/o"], "absent: no such file or folder"),
    "no model": (["{pipe}/scheduler", "{tmp}/o"], "neither a pipeline"),
    "a file": (["{pipe}/model_index.json", "{tmp}/o"], "this is a file"),
    "recipe": (["{pipe}", "{tmp}/o", "--recipe", "best"], "expected one of svdquant-int4"),
    "rule form": (["{pipe}", "{tmp}/o", "--rule", "x"], "--rule: expected GLOB=CHOICE, got 'x'"),
    "rule choice": (["{pipe}", "{tmp}/o", "--rule", "*=w2a2"], "expected one of w4a4"),
    "rule matches nothing": (["{pipe}", "{tmp}/o", "--rule", "zzz*=keep"], "rule 'zzz*'"),
    "component": (["{pipe}", "{tmp}/o", "--component", "unet"], "has no component 'unet'"),
    "component of a model": (["{pipe}/transformer", "{tmp}/o", "--component", "unet"], "only a pipeline"),
    "rank": (["{pipe}", "{tmp}/o", "--rank", "4096"], "rank 4096 exceeds"),
    "prompts": (["{pipe}", "{tmp}/o", "--prompts", "{tmp}/none.txt"], "none.txt: cannot be read"),
    "prompts of a model": (["{pipe}/transformer", "{tmp}/o", "--prompts", "{pipe}/model_index.json"], "whole pipeline"),
    "inside": (["{pipe}", "{pipe}/o"], "lies inside"),
    "itself": (["{pipe}", "{pipe}", "--overwrite"], "would replace the model"),
    "unwritable": (["{pipe}", "/proc/nowhere/o"], "/proc/nowhere/o: cannot be written"),
    "device": (["{pipe}", "{tmp}/o", "--device", "cuda:99"], "cuda:99"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_quantize(name: str, pipeline: Path, tmp_path: Path, refuses):
    argv, expected = MISTAKES[name]
    filled = [arg.format(tmp=tmp_path, pipe=pipeline) for arg in argv]
    assert expected in refuses("quantize", *filled, *([] if "--recipe" in argv or name == "rank" else FAST))
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_bad_prompts_are_refused(pipeline: Path, tmp_path: Path, refuses):
    for text, expected in (("\n \n", "holds no prompts"), ("a cat\n{cat}\n", "line 2: starts like JSON"),
                           ('{"prompt": 3}', "line 1: prompt: expected a text, got 3"),
                           ('{"prompt": "a cat", "height": "tall"}', "height: expected a whole number above 0")):
        (tmp_path / "prompts.txt").write_text(text)
        assert expected in refuses("quantize", pipeline, tmp_path / "o", "--prompts", tmp_path / "prompts.txt")


def test_quantized_and_damaged_models_are_refused(pipeline: Path, quantized: Path, tmp_path: Path, refuses):
    assert "already quantized" in refuses("quantize", quantized, tmp_path / "o", *FAST)
    shutil.copytree(pipeline / "transformer", tmp_path / "cut")
    file = next((tmp_path / "cut").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cut short" in refuses("quantize", tmp_path / "cut", tmp_path / "o", *FAST)
    (tmp_path / "cut/config.json").write_text("{")
    assert "cannot be read as JSON" in refuses("quantize", tmp_path / "cut", tmp_path / "o", *FAST)
    (tmp_path / "cut/config.json").write_text('{"_class_name": "NoSuchModel"}')
    file.write_bytes(next((pipeline / "transformer").glob("*.safetensors")).read_bytes())
    assert "NoSuchModel" in refuses("quantize", tmp_path / "cut", tmp_path / "o", *FAST)


# --------------------------------------------------------------------------------------------------------- interruption
def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Ctrl-C while block number `blocks` is at work."""
    whole, done = Run.quantize_block, []

    def interrupted(self, block, stats):
        if len(done) == blocks:
            raise KeyboardInterrupt
        done.append(block)
        return whole(self, block, stats)

    monkeypatch.setattr(Run, "quantize_block", interrupted)


def prompts_file(tmp_path: Path) -> Path:
    small = {"height": 64, "width": 64, "max_sequence_length": 16}
    lines = [json.dumps({"prompt": prompt, **small}) for prompt in ("a cat", "a dog")]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_interrupted_then_resumed_gives_the_same_bytes(calibrated: bool, pipeline: Path, tmp_path: Path, monkeypatch,
                                                       capsys):
    data = ["--prompts", str(prompts_file(tmp_path)), "--states", "2"] if calibrated else []
    run("quantize", pipeline, tmp_path / "whole", *FAST, *data)
    command = ["quantize", str(pipeline), str(tmp_path / "out"), *FAST, *data]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        capsys.readouterr()
        assert cli.main(command) == 130
    said = capsys.readouterr().err
    assert "the same command goes on from there" in said and "1 finished block" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    run(*command)
    resumed, uninterrupted = (digests(tmp_path / name, ".safetensors", ".json") for name in ("out", "whole"))
    for found in (resumed, uninterrupted):
        del found["report.json"]  # holds the seconds it took
    assert resumed == uninterrupted and len(resumed) > 5
    assert not (tmp_path / "out.partial").exists()


def test_unfinished_work_of_another_command_is_kept(pipeline: Path, tmp_path: Path, monkeypatch, refuses, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert cli.main(["quantize", str(pipeline), str(tmp_path / "out"), *FAST]) == 130
    capsys.readouterr()
    said = refuses("quantize", pipeline, tmp_path / "out", "--recipe", "rtn-nvfp4")
    assert "unfinished work of another command" in said
    assert list((tmp_path / "out.partial").rglob("*.safetensors"))


def test_interrupted_before_any_block_leaves_nothing(pipeline: Path, tmp_path: Path, monkeypatch, capsys):
    stop_after(monkeypatch, 0)
    assert cli.main(["quantize", str(pipeline), str(tmp_path / "out"), *FAST]) == 130
    assert "starts again" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- inspect
def test_inspect_a_pipeline_its_model_and_every_site(quantized: Path, capsys):
    run("inspect", quantized)
    whole = capsys.readouterr().out
    assert "vae: AutoencoderKL" in whole and "single_transformer_blocks.*.proj_mlp" in whole
    run("inspect", quantized / "transformer", "--all")
    every = capsys.readouterr().out
    assert "single_transformer_blocks.0.proj_out[128:640]" in every and "int4 g64 shifted" in every
    assert "smaller than the" in every
    sites = json.loads((quantized / "transformer/config.json").read_text())["quantization_config"]["sites"]
    assert all(name in every for name in sites)


def test_inspect_counts_every_byte(quantized: Path, capsys):
    run("inspect", quantized / "transformer")
    said = capsys.readouterr().out
    header = read_header(next((quantized / "transformer").glob("*.safetensors")))
    total = sum(tensor.nbytes for tensor in header.tensors.values())
    assert f"total: {total / 1024:.2f} KiB" in said or f"total: {total / 2**20:.2f} MiB" in said


def test_inspect_other_files(pipeline: Path, tmp_path: Path, capsys):
    from safetensors.torch import save_file

    run("inspect", pipeline / "transformer")
    assert "FluxTransformer2DModel" in capsys.readouterr().out
    save_file({"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}, tmp_path / "l.safetensors")
    run("inspect", tmp_path / "l.safetensors")
    assert "LoRA" in capsys.readouterr().out
    packed = {"a.qweight": torch.zeros(128, 64, dtype=torch.int8), "a.wscales": torch.zeros(2, 128)}
    save_file(packed, tmp_path / "n.safetensors")
    run("inspect", tmp_path / "n.safetensors")
    assert "Nunchaku" in capsys.readouterr().out
    save_file({"a.qweight": torch.zeros(2, 4), "a.scales": torch.zeros(4, 2)}, tmp_path / "g.safetensors")
    run("inspect", tmp_path / "g.safetensors")
    assert "quantized by another tool" in capsys.readouterr().out


def test_inspect_a_lora(quantized: Path, tmp_path: Path, capsys, refuses):
    """What it holds; and which modules of a model it would change."""
    from safetensors.torch import save_file

    file, name = tmp_path / "l.safetensors", "lora_unet_single_blocks_{}_linear2"
    state = {f"{name.format(i)}.lora_{half}.weight": torch.ones(*shape) for i in range(2)
             for half, shape in (("down", (3, 640)), ("up", (128, 3)))}
    more = {f"{name.format(0)}.alpha": torch.tensor(1.5), "te.nowhere.lora_A.weight": torch.ones(2, 4)}
    save_file(state | more, file)
    run("inspect", file)
    said = " ".join(capsys.readouterr().out.split())
    assert "kohya" in said and "3 modules" in said and "half a LoRA" in said
    assert f"{name.format('*')} LoRA 3 1.5 128 640" in said and "6 tensors" in said
    save_file(state, file)
    run("inspect", file, "--for", quantized)
    assert "(kohya (BFL names)): modules changed: 2 in transformer" in capsys.readouterr().out
    run("inspect", file, "--for", quantized / "transformer", "--all")
    assert name.format(1) in capsys.readouterr().out
    assert "is no LoRA file" in refuses("inspect", quantized, "--for", quantized)
    assert "no such file" in refuses("inspect", file, "--for", tmp_path / "absent")


def test_inspect_refuses_what_it_cannot_read(quantized: Path, tmp_path: Path, refuses):
    assert "no such file" in refuses("inspect", tmp_path / "absent")
    assert "neither a pipeline" in refuses("inspect", tmp_path)
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor")
    assert "not a safetensors file" in refuses("inspect", tmp_path / "text.safetensors")
    (tmp_path / "json.safetensors").write_bytes(struct.pack("<Q", 4) + b"[12]")
    assert "cannot be understood" in refuses("inspect", tmp_path / "json.safetensors")
    shutil.copytree(quantized / "transformer", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    site = {"kind": "w4a4", "format": "int4", "group": 64}
    config["quantization_config"]["sites"]["transformer_blocks.7.attn.to_q"] = site
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert "transformer_blocks.7.attn.to_q" in refuses("inspect", tmp_path / "model")
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert "format_version is 2" in refuses("inspect", tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------- generate
SMALL = ("--steps", "1", "--width", "64", "--height", "64")


def test_generate_writes_images_that_depend_on_seed_alone(quantized: Path, tmp_path: Path):
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        run("generate", quantized, "--prompt", "a cat", *SMALL, "--out", tmp_path / "made" / name, "--seed", seed)
    one, two, other = ((tmp_path / "made" / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert one == two != other


def test_generate_takes_modes_counts_and_16_bit(pipeline: Path, quantized: Path, tmp_path: Path):
    run("generate", quantized, "--prompt", "a cat", *SMALL, "--mode", "a4", "--count", "2", "--out", tmp_path / "x.png")
    run("generate", pipeline, "--prompt", "a cat", *SMALL, "--out", tmp_path / "y.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x-0.png", "x-1.png", "y.png"]


def test_generate_on_the_backend_asked_for(quantized: Path, tmp_path: Path, refuses):
    run("generate", quantized, "--prompt", "a cat", *SMALL, "--backend", "torch", "--out", tmp_path / "x.png")
    said = refuses("generate", quantized, "--prompt", "a cat", *SMALL, "--backend", "triton", "--device", "cpu",
                   "--out", tmp_path / "y.png")
    assert "no backend takes this call (triton: the tensors are on cpu)" in said
    assert BACKENDS == ORDER


def test_generate_with_loras(pipeline: Path, quantized: Path, tmp_path: Path, capsys, refuses):
    from safetensors.torch import save_file

    file = tmp_path / "style.safetensors"
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 128) / 9,
               "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(128, 2)}, file)
    pictures = {}
    for strength in ("", ":0.5", ":0", None):
        lora = [] if strength is None else ["--lora", f"{file}{strength}"]
        run("generate", quantized, "--prompt", "a cat", *SMALL, *lora, "--out", tmp_path / "x.png")
        pictures[strength] = (tmp_path / "x.png").read_bytes()
    assert pictures[":0"] == pictures[None] and len(set(pictures.values())) == 3
    assert "LoRA 'lora_0' (PEFT): 1 of 1 modules (1 in transformer), rank 2 (1)" in capsys.readouterr().out
    run("generate", quantized, "--prompt", "a cat", *SMALL, "--lora", file, "--lora", f"{file}:-1", "--out",
        tmp_path / "y.png")
    assert capsys.readouterr().out.count("1 of 1 modules") == 2
    run("generate", pipeline, "--prompt", "a cat", *SMALL, "--lora", file, "--out", tmp_path / "z.png")
    assert "no such file" in refuses("generate", quantized, "--prompt", "a cat", "--lora", tmp_path / "none:0.5")
    save_file({"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}, file)
    assert "it is for another model" in refuses("generate", quantized, "--prompt", "a cat", *SMALL, "--lora", file)


def test_mistakes_of_generate(pipeline: Path, quantized: Path, tmp_path: Path, refuses):
    assert "no such file" in refuses("generate", tmp_path / "absent", "--prompt", "x")
    assert "model alone" in refuses("generate", pipeline / "transformer", "--prompt", "x")
    assert "--prompt is missing" in refuses("generate", quantized)
    assert "image file" in refuses("generate", quantized, "--prompt", "x", "--out", tmp_path / "x.tensor")
    shutil.copytree(quantized, tmp_path / "cut")
    file = next((tmp_path / "cut/transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut short" in refuses("generate", tmp_path / "cut", "--prompt", "x", "--out", tmp_path / "x.png")


def test_quantize_is_the_function_after_the_commands_are_imported():
    assert callable(quantize)


def test_a_folder_of_the_work_folders_name_is_not_touched(refuses, pipeline: Path, tmp_path: Path):
    mine = tmp_path / "o.partial" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "exists and is not unfinished work" in refuses("quantize", pipeline, tmp_path / "o")
    assert mine.read_text() == "mine"
