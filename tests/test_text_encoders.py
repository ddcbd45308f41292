"""Text encoders: quantized alone or with their pipeline, saved and loaded by transformers as ever."""
from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.swap import quantized_modules, quantized_sites
from tests.checks import QUICK, differences, files_in, noisy, quantized_state, relative, run, state_of
from tests.tiny import PIPELINES, TEXT_ENCODERS

LEAST, MOST = 0.2, 1.0  # see test_architectures
RECIPES = ["w4a16-int4", QUICK]


@pytest.fixture(scope="module", params=TEXT_ENCODERS)
def quantized(request):
    """(model, inputs) in w4a16: not to be changed."""
    model, inputs = TEXT_ENCODERS[request.param]()
    nq.quantize(model, "w4a16-int4")
    return model, inputs


@pytest.mark.parametrize("recipe", RECIPES, ids=["w4a16", "svdquant"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_error_is_that_of_rounding(name: str, recipe, calibrated: bool) -> None:
    (model, inputs), (plain, _) = TEXT_ENCODERS[name](), TEXT_ENCODERS[name]()
    dense = run(plain, inputs)
    report = nq.quantize(model, recipe, [inputs] if calibrated else None, mode="a4")
    assert {row.data for row in report.rows} == {"calibrated" if calibrated else "data-free"}
    with noisy(plain, report.rows, True):
        expected = relative(run(plain, inputs), dense)
    assert LEAST * expected < relative(run(model, inputs), dense) < MOST * expected


def test_folder_by_transformers_and_by_us(quantized, tmp_path) -> None:
    model, inputs = quantized
    model.save_pretrained(tmp_path / "a")
    nq.save(model, tmp_path / "b")
    for loaded in (type(model).from_pretrained(tmp_path / "a"), nq.load(tmp_path / "b")):
        assert type(loaded) is type(model) and not loaded.training
        assert differences(model.state_dict(), loaded.state_dict()) == []
        assert torch.equal(run(model, inputs), run(loaded, inputs))


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_save_load_save_gives_the_same_bytes(quantized, tmp_path, suffix: str) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    nq.save(quantized[0], first)
    loaded = nq.load(first)
    assert torch.equal(run(*quantized), run(loaded, quantized[1]))
    nq.save(loaded, second)
    for a, b in [(first, second)] if suffix else [(first / name, second / name) for name in files_in(first)]:
        assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stored_tensors_survive_any_dtype(quantized, tmp_path, dtype: torch.dtype) -> None:
    model, inputs = quantized
    nq.save(model, tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m", dtype=dtype)
    assert differences(quantized_state(model), quantized_state(loaded)) == []
    y = run(loaded, inputs)
    assert y.dtype == dtype and relative(y, run(model, inputs)) < 0.03


def test_quantizing_while_loading(tmp_path) -> None:
    from nunchaku_py.transformers_hook import TextSVDQuantConfig

    model, inputs = TEXT_ENCODERS["t5"]()
    model.save_pretrained(tmp_path)
    config = TextSVDQuantConfig(recipe="w4a16-int4")
    streamed = type(model).from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    nq.quantize(model, "w4a16-int4")
    assert differences(quantized_state(model), quantized_state(streamed)) == []
    assert torch.equal(run(model, inputs), run(streamed, inputs))


def test_pipeline_with_quantized_encoders(tmp_path) -> None:
    from diffusers import FluxPipeline

    pipe, arguments = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, components={"transformer": QUICK, "text_encoder": "w4a16-int4", "text_encoder_2": "w4a16-int4"})
    pipe.save_pretrained(tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert differences(getattr(pipe, name).state_dict(), getattr(again, name).state_dict()) == [], name
    images = [p(**{**arguments, "generator": torch.Generator().manual_seed(0)}).images
              for p in (pipe, again, nq.load(tmp_path))]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_pipeline_quantization_config_for_both_libraries(tmp_path) -> None:
    from diffusers import FluxPipeline, PipelineQuantizationConfig

    from nunchaku_py.transformers_hook import TextSVDQuantConfig

    PIPELINES["flux_prompt"]()[0].save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": nq.SVDQuantConfig(recipe=QUICK),
                                                       "text_encoder_2": TextSVDQuantConfig(recipe="w4a16-int4")})
    pipe = FluxPipeline.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16)
    assert quantized_modules(pipe.transformer) and quantized_modules(pipe.text_encoder_2)
    assert not quantized_modules(pipe.text_encoder)


def test_wrong_weights_are_not_drawn_at_random(quantized, tmp_path) -> None:
    """transformers fills in what a file lacks: a quantized tensor that is missing must be an error all the same."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, _ = quantized
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".scales"))
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    for load in (nq.load, type(model).from_pretrained):
        with pytest.raises((ValueError, OSError, RuntimeError), match=name.replace(".", r"\.")):
            load(tmp_path)


def test_copies_modes_and_dense_twin(quantized) -> None:
    model, inputs = quantized
    state = state_of(model)
    twin = copy.deepcopy(model)
    assert {site.mode for site in quantized_sites(twin)} == {"a16"}
    dense = nq.dequantize(twin)
    assert not quantized_modules(dense)
    assert relative(run(dense, inputs), run(model, inputs)) < 0.02
    nn.Module.to(twin, torch.float32)
    assert differences(quantized_state(model), quantized_state(twin)) == []
    assert differences(state, model.state_dict()) == []


def test_dense_twin_saves_as_a_plain_model(quantized, tmp_path) -> None:
    dense = nq.dequantize(quantized[0])
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert differences(dense.state_dict(), type(dense).from_pretrained(tmp_path).state_dict()) == []


def test_a_pipeline_loads_in_the_dtype_of_its_quantized_model_with_every_bit(tmp_path) -> None:
    """The corrected biases of shifted sites are fp32 in a bf16 text encoder."""
    pipe, _ = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, QUICK, components=["transformer", "text_encoder"])
    nq.save(pipe, tmp_path / "p")
    loaded = nq.load(tmp_path / "p")
    assert loaded.vae.dtype == loaded.transformer.dtype == torch.bfloat16
    for name in ("transformer", "text_encoder"):
        state = getattr(pipe, name).state_dict()
        assert torch.float32 in {tensor.dtype for key, tensor in state.items() if key.endswith("bias")}
        assert differences(state, getattr(loaded, name).state_dict()) == []


def test_a_model_that_cannot_be_saved_says_so(tmp_path) -> None:
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64)})])})
    nq.quantize(model, QUICK)
    with pytest.raises(nq.NunchakuError, match="only models of diffusers and transformers know how to be saved"):
        nq.save(model, tmp_path / "m.safetensors")
