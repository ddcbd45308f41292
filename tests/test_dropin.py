"""A quantized model is a diffusers model: it saves and loads as one, and is quantized while being loaded as one."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import nunchaku_py as nq
from nunchaku_py.swap import quantized_modules, quantized_sites
from tests.checks import QUICK, cast, differences, files_in, quantized_state, relative, run
from tests.tiny import MODELS, PIPELINES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = "20KB"  # so that a tiny model is saved in several files


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    MODELS["flux"]()[0].save_pretrained(folder)
    return folder


def flux_class() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel


# ----------------------------------------------------------------------------------------------------- save and load
def test_pipeline_folder_gives_the_same_picture(quantized, tmp_path) -> None:
    from diffusers import FluxPipeline

    pipe, arguments = PIPELINES["flux_prompt"]()
    pipe.transformer = quantized[0]
    pipe.save_pretrained(tmp_path, max_shard_size=SMALL)
    again = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert differences(quantized[2], again.transformer.state_dict()) == []
    images = [p(**{**arguments, "generator": torch.Generator().manual_seed(0)}).images for p in (pipe, again)]
    assert torch.equal(*images) and images[0].isfinite().all()


@pytest.mark.parametrize("form", ["folder", "sharded", "single file"])
def test_every_form_gives_the_same_bits(quantized, tmp_path, form: str) -> None:
    model, inputs, state = quantized
    path = tmp_path / ("model.safetensors" if form == "single file" else "model")
    if form == "sharded":
        model.save_pretrained(path, max_shard_size=SMALL)
        assert len(list(path.glob("*.safetensors"))) > 3
    else:
        nq.save(model, path)
    loaded = nq.load(path)
    assert type(loaded) is type(model) and not loaded.training
    assert differences(state, loaded.state_dict()) == []
    assert torch.equal(run(model, inputs), run(loaded, inputs))


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_save_load_save_gives_the_same_bytes(quantized, tmp_path, suffix: str) -> None:
    for _ in range(3 if suffix else 0):  # a header written in random order would pass every second time
        nq.save(quantized[0], tmp_path / f"again{suffix}")
        nq.save(quantized[0], tmp_path / f"once more{suffix}")
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"once more{suffix}").read_bytes()
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    nq.save(quantized[0], first)
    nq.save(nq.load(first), second)
    if suffix:
        assert first.read_bytes() == second.read_bytes()
        return
    assert files_in(first) == files_in(second)
    for name in files_in(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_one_file_and_folder_hold_the_same(quantized, tmp_path) -> None:
    nq.save(quantized[0], tmp_path / "m.safetensors")
    nq.save(quantized[0], tmp_path / "m")
    folder = {name: t for file in (tmp_path / "m").glob("*.safetensors") for name, t in load_file(file).items()}
    assert differences(load_file(tmp_path / "m.safetensors"), folder) == []
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["quantization_config"] == json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("form", ["folder", "single file", "from_pretrained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_tensors_survive_any_dtype(quantized, tmp_path, form: str, dtype: torch.dtype) -> None:
    model, inputs, state = quantized
    path = tmp_path / ("m.safetensors" if form == "single file" else "m")
    nq.save(model, path)
    if form == "from_pretrained":
        loaded = flux_class().from_pretrained(path, torch_dtype=dtype)
    else:
        loaded = nq.load(path, dtype=dtype)
    assert differences(quantized_state(model), quantized_state(loaded)) == []
    assert loaded.dtype == dtype
    assert {p.dtype for n, p in loaded.named_parameters() if n.startswith("x_embedder")} == {dtype}
    inputs = {**inputs, "guidance": torch.tensor([2.0])}  # FLUX computes 1000·guidance in its dtype: exact in each
    y = run(loaded, cast(inputs, dtype))
    assert y.dtype == dtype and relative(y, run(model, inputs)) < 0.05


def test_save_into_the_folder_of_an_earlier_sharded_save(quantized, tmp_path) -> None:
    quantized[0].save_pretrained(tmp_path / "m", max_shard_size=SMALL)
    nq.save(quantized[0], tmp_path / "m")
    assert files_in(tmp_path / "m") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert differences(quantized[2], nq.load(tmp_path / "m").state_dict()) == []


def test_saving_spares_files_of_others(quantized, tmp_path) -> None:
    mine = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model_ema.safetensors", "lora.safetensors"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    nq.save(quantized[0], tmp_path)
    assert [(tmp_path / name).exists() for name in mine] == [True] * 3


@pytest.mark.parametrize("path", [".", "m", "m/", "../m", "m.safetensors", "./a/b/m"])
def test_relative_paths(quantized, tmp_path, monkeypatch, path: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    nq.save(quantized[0], path)
    assert differences(quantized[2], nq.load(path).state_dict()) == []


@pytest.mark.parametrize("name", ["m", "m.safetensors"])
def test_saving_over_the_file_a_model_was_loaded_from(quantized, tmp_path, name: str) -> None:
    """Its tensors may still lie in that file, mapped into memory."""
    nq.save(quantized[0], tmp_path / name)
    loaded = nq.load(tmp_path / name)
    nq.save(loaded, tmp_path / name)
    for model in (loaded, nq.load(tmp_path / name)):
        assert torch.equal(run(model, quantized[1]), run(*quantized[:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_than_bf16(tmp_path, dtype: torch.dtype) -> None:
    model, inputs = MODELS["flux"]()
    model, inputs = model.to(dtype), cast(inputs, dtype)
    dense = run(model, inputs)
    nq.quantize(model, QUICK)
    assert model.dtype == dtype and relative(run(model, inputs), dense) < 0.3
    nq.save(model, tmp_path / "m")
    nq.save(model, tmp_path / "m.safetensors")
    for path in (tmp_path / "m", tmp_path / "m.safetensors"):
        loaded = nq.load(path)
        assert loaded.dtype == dtype and torch.equal(run(loaded, inputs), run(model, inputs))


def test_variant_and_subfolder(quantized, tmp_path) -> None:
    quantized[0].save_pretrained(tmp_path / "transformer", variant="int4")
    loaded = flux_class().from_pretrained(tmp_path, subfolder="transformer", variant="int4",
                                          torch_dtype=torch.bfloat16)
    assert differences(quantized[2], loaded.state_dict()) == []


def test_mode_is_chosen_at_load_not_stored(fresh, tmp_path) -> None:
    model, inputs, _ = fresh
    nq.set_mode(model, "a16")
    nq.save(model, tmp_path / "m")
    assert {site.mode for site in quantized_sites(nq.load(tmp_path / "m")) if site.site.kind == "w4a4"} == {"a8"}
    loaded = nq.load(tmp_path / "m", mode="a16")
    assert {site.mode for site in quantized_sites(loaded)} == {"a16"}
    assert torch.equal(run(model, inputs), run(loaded, inputs))


# -------------------------------------------------------------------------------------------- quantizing while loading
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("recipe", [QUICK, "rtn-nvfp4"], ids=["quick-int4", "rtn-nvfp4"])
def test_quantizing_while_loading_is_quantizing_what_was_loaded(dense_folder, tmp_path, recipe, sharded) -> None:
    folder = dense_folder
    if sharded:
        folder = tmp_path
        MODELS["flux"]()[0].save_pretrained(folder, max_shard_size=SMALL)
    config = nq.SVDQuantConfig(recipe=recipe)
    streamed = flux_class().from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    loaded = flux_class().from_pretrained(folder, torch_dtype=torch.bfloat16)
    nq.quantize(loaded, recipe)
    assert differences(loaded.state_dict(), streamed.state_dict()) == []
    inputs = MODELS["flux"]()[1]
    assert torch.equal(run(loaded, inputs), run(streamed, inputs))


def test_quantizing_while_loading_keeps_the_configs_wishes(dense_folder) -> None:
    wishes = nq.SVDQuantConfig(recipe=QUICK, rank=4, rules={"single_*": "keep"}, mode="a16")
    model = flux_class().from_pretrained(dense_folder, quantization_config=wishes, torch_dtype=torch.bfloat16)
    assert not any(name.startswith("single_") for name in quantized_modules(model))
    assert {(site.mode, site.site.rank) for site in quantized_sites(model) if site.site.kind == "w4a4"} == {("a16", 4)}


def test_quantized_while_loading_saves_and_reloads(dense_folder, tmp_path) -> None:
    config = nq.SVDQuantConfig(recipe=QUICK)
    model = flux_class().from_pretrained(dense_folder, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert differences(model.state_dict(), flux_class().from_pretrained(tmp_path).state_dict()) == []


def test_pipeline_quantization_config(tmp_path) -> None:
    from diffusers import FluxPipeline, PipelineQuantizationConfig

    PIPELINES["flux_prompt"]()[0].save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": nq.SVDQuantConfig(recipe=QUICK)})
    pipe = FluxPipeline.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16)
    expected = MODELS["flux"]()[0]
    nq.quantize(expected, QUICK)
    assert differences(expected.state_dict(), pipe.transformer.state_dict()) == []


def test_single_file_of_a_16_bit_model(dense_folder) -> None:
    config = nq.SVDQuantConfig(recipe=QUICK)
    model = flux_class().from_single_file(dense_folder / "diffusion_pytorch_model.safetensors",
                                          config=str(dense_folder), quantization_config=config,
                                          torch_dtype=torch.bfloat16)
    expected = MODELS["flux"]()[0]
    nq.quantize(expected, QUICK)
    assert differences(expected.state_dict(), model.state_dict()) == []
