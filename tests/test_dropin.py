"""A quantized model is a diffusers model: saving, loading and casting, offload, copies, compilation."""
from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import nunchaku_py as nq
from nunchaku_py.linear import QuantizedSite
from nunchaku_py.swap import quantized_modules, quantized_sites
from tests.checks import QUICK, QUICK_NVFP4, differences, files_in, quantized_state, relative, run, state_of
from tests.tiny import MODELS, PIPELINES
from tests.tiny_pipelines import flux_call, flux_pipeline

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = "20KB"  # so that a tiny model is saved in several files


@pytest.fixture(scope="module", params=[QUICK, QUICK_NVFP4], ids=["int4", "nvfp4"])
def quantized(request) -> tuple[nn.Module, dict, dict]:
    """(FLUX, forward arguments, its state): not to be changed."""
    model, inputs = MODELS["flux"]()
    nq.quantize(model, request.param)
    return model, inputs, state_of(model)


@pytest.fixture
def fresh(quantized) -> tuple[nn.Module, dict, dict]:
    """A copy to do what one likes with."""
    model, inputs, state = quantized
    return copy.deepcopy(model), inputs, state


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    MODELS["flux"]()[0].save_pretrained(folder)
    return folder


def _cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 else v
            for k, v in inputs.items()}


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
    y = run(loaded, _cast(inputs, dtype))
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


@pytest.mark.parametrize("path", [pytest.param(".", marks=pytest.mark.xfail(strict=True, reason="has no name")),
                                  "m", "m/", "../m", "m.safetensors", "./a/b/m"])
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
    model, inputs = model.to(dtype), _cast(inputs, dtype)
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


# ------------------------------------------------------------------------------------------------------------- offload
def test_accelerate_cpu_offload(fresh) -> None:
    from accelerate import cpu_offload

    model, inputs, state = fresh
    expected = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)


def test_offloaded_inside_a_pipeline(fresh) -> None:
    from accelerate import cpu_offload

    pipe = flux_pipeline(transformer=fresh[0])
    expected = pipe(**flux_call()).images
    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(pipe(**flux_call()).images, expected)


@pytest.mark.parametrize("how", [dict(offload_type="leaf_level"),
                                 dict(offload_type="block_level", num_blocks_per_group=1)], ids=["leaf", "block"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_group_offload(fresh, tmp_path, how: dict, to_disk: bool) -> None:
    model, inputs, _ = fresh
    expected = run(model, inputs)
    disk = dict(offload_to_disk_path=str(tmp_path)) if to_disk else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **how, **disk)
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)


def test_layerwise_casting_leaves_stored_tensors(fresh) -> None:
    model, inputs, _ = fresh
    stored = quantized_state(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    y = run(model, inputs)
    assert y.isfinite().all()
    assert differences(stored, quantized_state(model)) == []


# ------------------------------------------------------------------------------------------------- copies and casting
def test_copies(quantized) -> None:
    model, inputs, state = quantized
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = run(model, inputs)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert differences(state, twin.state_dict()) == []
        assert torch.equal(run(twin, inputs), expected)


def test_a_copy_shares_nothing(quantized) -> None:
    model, _, state = quantized
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert differences(state, model.state_dict()) == []


def test_state_dict_goes_into_another_quantized_model(quantized) -> None:
    model, inputs, state = quantized
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data.mul_(0.5)
    for site in quantized_sites(other):
        site.pack()
    assert not torch.equal(run(other, inputs), run(model, inputs))
    other.load_state_dict(state)
    assert torch.equal(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting(fresh, dtype: torch.dtype) -> None:
    """diffusers refuses model.to(dtype) for a quantized model, as for every backend; nn.Module's own cast works."""
    model, inputs, _ = fresh
    stored = quantized_state(model)
    with pytest.raises(ValueError, match="quantized"):
        model.to(dtype)
    assert differences(stored, quantized_state(model)) == []
    nn.Module.to(model, dtype)
    assert differences(stored, quantized_state(model)) == []
    assert model.dtype == dtype
    assert run(model, _cast(inputs, dtype)).dtype == dtype


def test_to_device_and_train_and_eval(fresh) -> None:
    model, inputs, state = fresh
    expected = run(model, inputs)
    assert model.to("cpu") is model
    model.train()
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(run(model, inputs), expected)
    assert differences(state, model.state_dict()) == []


def test_meta_device() -> None:
    """A quantized model can be moved to the meta device, for the shape of its answer to be asked, and it says so."""
    model, inputs = MODELS["pixart"]()
    nq.quantize(model, "rtn-int4")
    nn.Module.to(model, "meta")
    assert all(p.is_meta for p in model.parameters())


def test_dtype_and_memory(quantized) -> None:
    model, _, state = quantized
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert model.is_quantized
    stored = sum(t.numel() * t.element_size() for t in state.values())
    derived = sum(b.numel() * b.element_size() for b in model.buffers())
    assert stored <= model.get_memory_footprint() <= stored + derived
    dense = MODELS["flux"]()[0].get_memory_footprint()
    assert stored < 0.55 * dense
    assert model.num_parameters() > 0


def test_dequantized_model_is_dense_and_what_a16_computes(fresh, tmp_path) -> None:
    model, inputs, state = fresh
    nq.set_mode(model, "a16")
    dense = nq.dequantize(model)
    assert not quantized_modules(dense) and not getattr(dense, "is_quantized", False)
    assert relative(run(dense, inputs), run(model, inputs)) < 0.02  # one rounding of the weights to bf16
    dense.save_pretrained(tmp_path)
    plain = flux_class().from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert differences(dense.state_dict(), plain.state_dict()) == []
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dense.to(torch.float16)
    nq.quantize(dense, "rtn-int4")
    assert differences(state, model.state_dict()) == []


# ------------------------------------------------------------------------------------- what diffusers does to models
def test_processors_backends_caches_and_checkpointing(quantized) -> None:
    from diffusers import FirstBlockCacheConfig
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    model, inputs, _ = quantized
    expected = run(model, inputs)
    changes = {
        "processor": lambda m: m.set_attn_processor(FluxAttnProcessor()),
        "backend": lambda m: m.set_attention_backend("native"),
        "cache": lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=0.0)),
        "checkpointing": lambda m: (m.enable_gradient_checkpointing(), m.train()),
        "compile": lambda m: m.compile(backend="eager"),
    }
    for name, change in changes.items():
        twin = copy.deepcopy(model)
        change(twin)
        with twin.cache_context("a"):
            assert torch.equal(run(twin, inputs), expected), name


SILENT = pytest.mark.xfail(strict=True, reason="rounding stops gradients, without a word")


@pytest.mark.parametrize("mode", [pytest.param("a4", marks=SILENT), pytest.param("a8", marks=SILENT), "a16"])
def test_gradients(quantized, mode: str) -> None:
    """What guidance by a loss or training in front of a frozen model needs: dL/dx = dL/dy · W, or a refusal."""
    module = copy.deepcopy(quantized[0].transformer_blocks[0].attn.to_q)
    module.set_mode(mode)
    x = torch.randn(16, module.in_features).bfloat16().requires_grad_()
    try:
        y = module(x)
    except nq.NunchakuError:
        return
    g = torch.randn_like(y)
    y.backward(g)
    assert relative(x.grad, g.float() @ module.effective_weight()) < 0.02
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_quantizing_under_group_offload_and_after_compile() -> None:
    for change in (lambda m: m.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level",
                                                    offload_device=torch.device("cpu")),
                   lambda m: m.compile(backend="eager")):
        model, inputs = MODELS["flux"]()
        dense = run(model, inputs)
        change(model)
        run(model, inputs)
        nq.quantize(model, QUICK)
        assert 0.01 < relative(run(model, inputs), dense) < 0.3


# ----------------------------------------------------------------------------------------------------- looks and inputs
def test_quantized_linears_look_like_linears(quantized) -> None:
    model, _, _ = quantized
    plain = MODELS["flux"]()[0]
    for name, module in quantized_modules(model).items():
        old = plain.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (old.in_features, old.out_features)
        assert module.weight.shape == old.weight.shape and module.weight.dtype == torch.bfloat16
        assert module.weight.device == old.weight.device and (old.bias is None or module.bias is not None)
        assert f"{name}.weight" not in model.state_dict()
    assert str(model)


def test_peft_can_look_at_the_weights(quantized) -> None:
    """LoRA itself comes later; what PEFT asks of a layer before it starts must not crash."""
    from peft.tuners.tuners_utils import _get_in_out_features

    for name, module in quantized[0].named_modules():
        if isinstance(module, QuantizedSite):
            assert _get_in_out_features(module) == (module.in_features, module.out_features), name


def test_modes(fresh) -> None:
    model, inputs, state = fresh
    answers = {}
    for mode in ("a4", "a8", "a16", "a8", "a4"):
        nq.set_mode(model, mode)
        y = run(model, inputs)
        assert torch.equal(answers.setdefault(mode, y), y), "a mode that is left and entered again gives the same"
        assert differences(state, model.state_dict()) == []
    assert relative(answers["a8"], answers["a16"]) < relative(answers["a4"], answers["a16"])


@pytest.mark.parametrize("side", [1, 2, 7, 22])
def test_token_counts(quantized, side: int) -> None:
    """1 to 484 image tokens."""
    model, inputs, _ = quantized
    from tests.tiny_models import normal

    tokens = side * side
    sized = {**inputs, "hidden_states": normal(1, tokens, 64), "img_ids": torch.zeros(tokens, 3)}
    y = run(model, sized)
    assert y.shape == (1, tokens, 64) and y.isfinite().all()


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
def test_rows_do_not_see_each_other(quantized, mode: str) -> None:
    """Any number of rows, contiguous or not, one by one or together: the same numbers but for the order of sums."""
    module = copy.deepcopy(quantized[0].transformer_blocks[0].ff.net[0].proj)
    module.set_mode(mode)
    x = torch.randn(4608, module.in_features).bfloat16()
    y = module(x)
    assert torch.equal(module(x.T.contiguous().T), y)
    assert torch.equal(module(x.reshape(2, 48, 48, -1)).reshape(4608, -1), y)
    wide = torch.randn(4608, 2 * module.in_features).bfloat16()
    wide[:, ::2] = x
    assert torch.equal(module(wide[:, ::2]), y)
    for rows in (1, 3, 7, 513):
        assert relative(module(x[:rows]), y[:rows]) < 2**-8, rows  # bf16 rounds once
    assert module(x[:0]).shape == (0, module.out_features)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches(batch: int) -> None:
    from tests.tiny_models import flux

    model, inputs = flux(batch)
    dense = run(model, inputs)
    nq.quantize(model, QUICK)
    y = run(model, inputs)
    assert y.shape == dense.shape and relative(y, dense) < 0.3
    alone = {k: v[:1] if isinstance(v, torch.Tensor) and "ids" not in k else v for k, v in inputs.items()}
    assert relative(run(model, alone), y[:1]) < 0.02


# ------------------------------------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("mode", ["a4", "a16"])
def test_compiled_blocks(mode: str) -> None:
    model, inputs = MODELS["flux"]()
    nq.quantize(model, QUICK, mode=mode)
    expected = run(model, inputs)
    torch._dynamo.reset()
    model.single_transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    model.transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    assert relative(run(model, inputs), expected) < 0.02


def test_compile_repeated_blocks(fresh) -> None:
    """In a8, which is what a CPU runs by itself."""
    model, inputs, _ = fresh
    expected = run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative(run(model, inputs), expected) < 0.02
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_inductor(quantized) -> None:
    module = copy.deepcopy(quantized[0].transformer_blocks[0].attn.to_q)
    x = torch.randn(16, module.in_features).bfloat16()
    expected = module(x)
    torch._dynamo.reset()
    assert relative(torch.compile(module, fullgraph=True)(x), expected) < 2**-8
