"""Models of ours as files of Nunchaku's and back: nothing is lost, and what cannot be held is refused or said."""
from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.checkpoint.tensor_file import TensorFile, layout_of, write_tensors
from nunchaku_py.swap import quantized_modules
from tests.checks import QUICK, QUICK_NVFP4, differences, run, state_of
from tests.tiny import MODELS
from tests.tiny_models import randomise

RECIPES = {"int4": QUICK, "nvfp4": QUICK_NVFP4}
KEPT = {"sdxl": "*attn2.to_[kv]", "sana": "*attn2.to_[kv]", "z_image": "*adaLN*"}  # 16 bit in Nunchaku's files


def quantized(name: str, fmt: str = "int4", **more: str) -> tuple:
    """(model, forward arguments)"""
    model, inputs = MODELS[name]()
    rules = {KEPT[name]: "keep"} if name in KEPT else {}
    nq.quantize(model, RECIPES[fmt], rules={**rules, **more})
    return model, inputs


def contents(path: Path) -> tuple[dict, dict]:
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.names()}, dict(file.metadata)


def rewritten(path: Path, to: Path, change) -> Path:
    """The file with its tensors and metadata changed in place by `change`."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    write_tensors(to, layout_of(tensors), tensors.items(), metadata)
    return to


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(model, inputs, its file): not to be changed."""
    model, inputs = quantized("flux")
    path = tmp_path_factory.mktemp("flux") / "svdq.safetensors"
    nq.export(model, path, "nunchaku")
    return model, inputs, path


@pytest.mark.parametrize("fmt", RECIPES)
@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image", "sdxl", "sana"])
def test_there_and_back(name: str, fmt: str, tmp_path: Path):
    model, inputs = quantized(name, fmt)
    path = tmp_path / "svdq.safetensors"
    notes = nq.export(model, path, "nunchaku")
    back = nq.load(path)
    assert type(back) is type(model) and not differences(state_of(model), state_of(back))
    assert torch.equal(run(model, inputs), run(back, inputs))
    biases = {"flux": 2, "qwen_image": 2}.get(name, 0) - (fmt == "nvfp4" and name in ("flux", "qwen_image"))
    assert len(notes.changes) == biases  # of modulations, and in INT4 of shifted linears
    assert all("bias" in kind and largest < 0.05 for kind, (_, largest) in notes.changes.items())
    again = tmp_path / "again.safetensors"
    nq.export(back, again, "nunchaku")
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("form", ["folder", "single.safetensors"])
def test_by_way_of_our_own_format(form: str, flux: tuple, tmp_path: Path):
    _, _, path = flux
    bare = rewritten(path, tmp_path / "bare.safetensors", lambda _, metadata: metadata.pop("nunchaku_py"))
    model = nq.load(bare)
    nq.save(model, tmp_path / form)
    back = nq.load(tmp_path / form)
    assert not differences(state_of(model), state_of(back))
    nq.export(back, tmp_path / "again.safetensors", "nunchaku")
    (tensors, metadata), (again, said) = contents(bare), contents(tmp_path / "again.safetensors")
    assert not differences(tensors, again)
    assert {key: said[key] for key in metadata} == metadata


def test_what_other_readers_are_told(flux: tuple):
    model, _, path = flux
    _, metadata = contents(path)
    assert metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    assert json.loads(metadata["quantization_config"])["rank"] == 16  # of 8 and 16 (two of proj_out), padded
    config = json.loads(metadata["config"])
    assert config["_class_name"] == "FluxTransformer2DModel" and "quantization_config" not in config
    comfy = json.loads(metadata["comfy_config"])
    assert comfy["model_class"] == "Flux" and comfy["model_config"]["hidden_size"] == 128
    assert comfy["model_config"]["depth"] == model.config.num_layers


def test_exact_biases_are_only_for_the_file_they_are_of(flux: tuple, tmp_path: Path):
    """Somebody has changed a bias since: then the metadata is of another file."""
    name = "transformer_blocks.0.mlp_fc2.bias"

    def change(tensors: dict, _: dict) -> None:
        tensors[name] = tensors[name] + 1

    other = nq.load(rewritten(flux[2], tmp_path / "changed.safetensors", change))
    old, new = (model.transformer_blocks[0].ff.net[2].bias for model in (flux[0], other))
    assert new.dtype == torch.bfloat16 and torch.allclose(new.float(), old.float() + 1, atol=0.02)


def test_smoothing_that_was_fused(flux: tuple, tmp_path: Path):
    """smooth is ones and smooth_orig is not: what is read knows it, and what is written has it."""
    divisor = (0.5 + torch.rand(128)).bfloat16()

    def fuse(tensors: dict, metadata: dict) -> None:
        metadata.pop("nunchaku_py")
        for name in [name for name in tensors if name.endswith((".out_proj.smooth", "_proj_context.smooth"))]:
            if "out_proj" in name:
                tensors[f"{name}_orig"], tensors[name] = divisor.clone(), torch.ones(128).bfloat16()

    path = rewritten(flux[2], tmp_path / "fused.safetensors", fuse)
    model = nq.load(path)
    found = {name: module.site.divided for name, module in quantized_modules(model).items()
             if hasattr(module, "site") and module.site.divided}
    double, single = model.transformer_blocks[0].attn, model.single_transformer_blocks[0]
    assert set(found.values()) == {"input", "output"}
    assert found["transformer_blocks.0.attn.to_v"] == found["transformer_blocks.0.attn.add_v_proj"] == "output"
    assert found["transformer_blocks.0.attn.to_out.0"] == found["transformer_blocks.0.attn.to_add_out"] == "input"
    assert single.proj_out.parts[0].site.divided == "input" and single.attn.to_v.site.divided == "output"
    assert not torch.equal(double.to_v.divisor, divisor) and torch.equal(
        double.to_v.divisor.sort().values, divisor.sort().values)  # in the order of channels
    nq.save(model, tmp_path / "ours")
    for number, one in enumerate((model, nq.load(tmp_path / "ours"))):
        again = tmp_path / f"again{number}.safetensors"
        nq.export(one, again, "nunchaku")
        assert not differences(contents(path)[0], contents(again)[0])


def test_smoothing_that_was_fused_into_a_linear_in_16_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """SDXL's cross-attention: `to_v` cannot say that it is divided, so `to_out` does not either."""
    model, inputs = quantized("sdxl")
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")

    def fuse(tensors: dict, metadata: dict) -> None:
        metadata.pop("nunchaku_py")
        for name in [name for name in tensors if name.endswith("to_out.0.smooth")]:
            tensors[f"{name}_orig"], tensors[name] = 0.2 + torch.rand(128).bfloat16(), torch.ones(128).bfloat16()

    read = nq.load(rewritten(tmp_path / "svdq.safetensors", tmp_path / "fused.safetensors", fuse), mode="a16")
    block = read.mid_block.attentions[0].transformer_blocks[0]
    assert (block.attn1.to_v.site.divided, block.attn1.to_out[0].site.divided) == ("output", "input")
    assert block.attn2.to_out[0].site.divided == ""
    assert "attn2.to_out.0: its smoothing was fused into a linear that is not quantized here" in caplog.text
    wanted, got = run(read, inputs).float(), run(nq.dequantize(read), inputs).float()
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.03  # of weights in bfloat16


def test_text_encoders(tmp_path: Path):
    from transformers import T5Config, T5EncoderModel

    model = randomise(T5EncoderModel(T5Config(vocab_size=32, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2,
                                              feed_forward_proj="gated-gelu")))
    nq.quantize(model, "w4a16-int4")
    path, again = tmp_path / "awq.safetensors", tmp_path / "again.safetensors"
    notes = nq.export(model, path, "nunchaku")
    [(kind, (count, error))] = notes.changes.items()
    assert "rounded again to uint4" in kind and count == 14 and error < 0.12  # groups of 64 become 128
    back = nq.load(path)
    assert type(back) is T5EncoderModel
    assert {module.site.group for module in quantized_modules(back).values()} == {128}
    assert back.encoder.embed_tokens.weight is back.shared.weight
    nq.export(back, again, "nunchaku")
    assert not differences(contents(path)[0], contents(again)[0])
    tokens = {"input_ids": torch.arange(6)[None]}
    a, b = run(model, tokens), run(back, tokens)
    assert ((a - b).float().norm() / a.float().norm()).item() < 2 * error * len(quantized_modules(model)) ** 0.5


@pytest.mark.parametrize("name, rule, match", [
    ("flux", {"*.attn.to_k": "keep"}, "hold .*to_q and .*to_k and .*to_v alike, as .*qkv_proj"),
    ("flux", {"*.ff.net.2": "keep"}, "ff.net.2: is in 16 bit, and Nunchaku's files hold it in 4 bits"),
    ("flux", {"proj_out": "w4a16"}, "proj_out: is quantized, and Nunchaku's files hold it in 16 bit"),
    ("sdxl", {"*attn2.to_[kv]": "w4a4"}, "attn2.to_k: is quantized"),
    ("pixart", {}, "PixArtTransformer2DModel: Nunchaku has no files of this architecture"),
])
def test_models_that_its_files_cannot_hold(name: str, rule: dict, match: str, tmp_path: Path):
    model, _ = quantized(name, **rule)
    with pytest.raises(nq.NunchakuError, match=match):
        nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")
    assert not list(tmp_path.iterdir())


def test_linears_that_would_be_one_must_agree(flux: tuple, tmp_path: Path):
    model = copy.deepcopy(flux[0])
    attention = model.transformer_blocks[1].attn
    attention.to_k.set_tensor("smooth", attention.to_k.smooth.data * 2)
    with pytest.raises(nq.NunchakuError, match=r"transformer_blocks.1.attn.to_k: its smooth is not that of .*to_q"):
        nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")


def test_other_groups_are_refused(tmp_path: Path):
    model, _ = MODELS["flux"]()
    nq.quantize(model, replace(QUICK, group=32))
    with pytest.raises(nq.NunchakuError, match="is in groups of 32, and Nunchaku's files hold int4 in groups of 64"):
        nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")


def test_forms_and_names(flux: tuple, tmp_path: Path):
    for form, path, match in (("nunchaku", "folder", "is one file"), ("nunchaku_lite", "a.safetensors", "is a folder"),
                              ("gguf", "a", "expected one of nunchaku_py, nunchaku, nunchaku_lite, got 'gguf'")):
        with pytest.raises(nq.NunchakuError, match=match):
            nq.export(flux[0], tmp_path / path, form)


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
def test_modes_and_dtypes_of_what_is_loaded(mode: str, flux: tuple):
    model = nq.load(flux[2], mode=mode, dtype=torch.float16)
    assert model.transformer_blocks[0].attn.to_q.mode == mode and model.x_embedder.weight.dtype == torch.float16
    assert not [name for name in differences(quantized_state(flux[0]), quantized_state(model))]


def quantized_state(model: torch.nn.Module) -> dict:
    return {f"{name}.{leaf}": tensor for name, module in quantized_modules(model).items()
            for leaf, tensor in module.state_dict().items()}


def test_one_16_bit_type_for_a_file(flux: tuple, tmp_path: Path):
    """Loaded in another than it is stored in, what is not quantized is cast back."""
    notes = nq.export(nq.load(flux[2], dtype=torch.float16), tmp_path / "again.safetensors", "nunchaku")
    assert any("in float16, cast to bfloat16" in kind for kind in notes.changes)
    assert {tensor.dtype for tensor in contents(tmp_path / "again.safetensors")[0].values()} == {
        torch.int8, torch.int32, torch.bfloat16}


def test_a_lora_on_what_is_read(flux: tuple):
    """To LoRAs it is the model that was written."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=["to_q", "to_v", "proj_out", "norm.linear"], init_lora_weights=False)
    models = [copy.deepcopy(flux[0]), nq.load(flux[2])]
    outputs = []
    for model in models:
        torch.manual_seed(1)
        outputs.append(run(inject_adapter_in_model(config, model), flux[1]))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], run(flux[0], flux[1]))
