"""Nunchaku's files that other tools changed, and what its own loader asks of those we write."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

import nunchaku_py as nq
from nunchaku_py.checkpoint.nunchaku import packing
from nunchaku_py.checkpoint.nunchaku.families import SANA
from nunchaku_py.checkpoint.nunchaku.linears import Linear
from nunchaku_py.checkpoint.nunchaku.rows import Arrangement
from nunchaku_py.swap import quantized_modules, quantized_sites
from tests.checkpoint.test_nunchaku import contents, flux, quantized, rewritten  # noqa: F401  (flux: a fixture)
from tests.checks import QUICK, differences, state_of
from tests.tiny_models import flux_config, randomise


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_dtype_reaches_tensors_that_have_another_name_in_the_file(name: str, tmp_path: Path):
    model, _ = quantized(name)
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")
    back = nq.load(tmp_path / "svdq.safetensors", dtype=torch.float16)
    sites = {name for name, module in back.named_modules() if getattr(module, "is_nunchaku_quantized", False)}
    others = {name: parameter.dtype for name, parameter in back.named_parameters()
              if not any(name.startswith(f"{site}.") for site in sites)}
    assert set(others.values()) == {torch.float16}, others


def test_a_lora_that_another_tool_put_into_the_branch_is_kept(flux: tuple, tmp_path: Path):  # noqa: F811
    """The metadata knows lower ranks than the file has now."""
    name, module = "transformer_blocks.0.out_proj", "transformer_blocks.0.attn.to_out.0"
    old = flux[0].get_submodule(module)
    torch.manual_seed(0)
    a, b = torch.randn(16, 128).bfloat16(), torch.randn(128, 16).bfloat16()

    def add(tensors: dict, _: dict) -> None:
        down, up = (tensors[f"{name}.lora_{half}"] for half in ("down", "up"))
        rank = down.shape[1]
        down = torch.cat((packing.unpack_down(down, 128, rank), a))
        up = torch.cat((packing.unpack_up(up, 128, rank), b), 1)
        tensors[f"{name}.lora_down"] = packing.pack_down(down, rank + 16)
        tensors[f"{name}.lora_up"] = packing.pack_up(up, rank + 16)

    new = nq.load(rewritten(flux[2], tmp_path / "lora.safetensors", add)).get_submodule(module)
    assert torch.allclose(new.effective_weight(), old.effective_weight() + b.float() @ a.float(), atol=1e-4)


def test_sites_in_the_metadata_that_are_not_those_of_the_file(flux: tuple, tmp_path: Path):  # noqa: F811
    def cut(_: dict, metadata: dict) -> None:
        own = json.loads(metadata["nunchaku_py"])
        parts = own["sites"]["single_transformer_blocks.0.proj_out"]["parts"]
        parts.pop()
        metadata["nunchaku_py"] = json.dumps(own)

    model = nq.load(rewritten(flux[2], tmp_path / "cut.safetensors", cut))
    assert [part.site.rank for part in model.single_transformer_blocks[0].proj_out.parts] == [
        flux[0].single_transformer_blocks[0].proj_out.parts[0].site.rank, 16]


@pytest.mark.parametrize("name, module", [
    ("transformer_blocks.1.mlp_fc1", "transformer_blocks.1.ff.net.0.proj"),
    ("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1.linear"),
    ("transformer_blocks.0.qkv_proj", "transformer_blocks.0.attn.to_q"),
])
def test_a_bias_that_is_missing_is_not_made_up(name: str, module: str, flux: tuple, tmp_path: Path):  # noqa: F811
    path = rewritten(flux[2], tmp_path / "cut.safetensors", lambda tensors, _: tensors.pop(f"{name}.bias"))
    with pytest.raises(nq.NunchakuError, match=rf"{module}: the file holds no bias for it, and FluxTransf"):
        nq.load(path)


def test_metadata_that_nobody_understands_is_no_reason_not_to_write(flux: tuple, tmp_path: Path):  # noqa: F811
    def change(_: dict, metadata: dict) -> None:
        metadata.update(quantization_config="svdquant", remark="kept")

    model = nq.load(rewritten(flux[2], tmp_path / "odd.safetensors", change))
    model.config.quantization_config.report["source"]["metadata"]["number"] = 5  # as an edited config.json may say
    nq.export(model, tmp_path / "again.safetensors", "nunchaku")
    said = contents(tmp_path / "again.safetensors")[1]
    assert said["quantization_config"] == contents(flux[2])[1]["quantization_config"] and said["remark"] == "kept"
    assert "number" not in said


@pytest.mark.parametrize("form", ["nunchaku", "nunchaku_lite", "nunchaku_py"])
def test_files_are_read_and_written_whatever_the_default_device_is(form: str, flux: tuple, tmp_path: Path):  # noqa: F811
    """The meta device stands for a GPU: what is made there cannot be used here."""
    path = tmp_path / ("folder" if form == "nunchaku_lite" else "svdq.safetensors")
    with torch.device("meta"):
        nq.export(flux[0], path, form)
        if form != "nunchaku_lite":  # diffusers reads the folder, by its own rules
            model = nq.load(path)
            assert not differences(state_of(flux[0]), state_of(model))
    if form == "nunchaku_lite":
        nq.export(flux[0], tmp_path / "other", form)
        assert all((path / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
                   for name in ("config.json", "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image", "sdxl", "sana"])
def test_biases_that_the_engine_asks_for(name: str, fmt: str, tmp_path: Path):
    """Its Python models load strictly: a bias where diffusers' class has one, and no other."""
    model, _ = quantized(name, fmt)
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")
    tensors, _ = contents(tmp_path / "svdq.safetensors")
    linears = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    without = {linear for linear in linears if f"{linear}.bias" not in tensors}
    if name in ("flux", "qwen_image", "sana"):
        assert not without
    elif name == "z_image":
        assert without == linears
    else:
        assert {linear.rpartition("transformer_blocks.0.")[2] for linear in without} == {"attn1.to_qkv", "attn2.to_q"}


def test_one_scale_for_all_weights_of_sdxl_is_one_for_each_channel(tmp_path: Path):
    """Its loader knows no wtscale, and wants a wcscales of every linear."""
    model, _ = quantized("sdxl", "nvfp4")
    for module in quantized_modules(model).values():
        module.set_tensor("channel_scale", torch.full_like(module.channel_scale.data, 0.5))
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")
    tensors, _ = contents(tmp_path / "svdq.safetensors")
    assert not any(key.endswith("wtscale") for key in tensors)
    assert all(key.removesuffix("qweight") + "wcscales" in tensors for key in tensors if key.endswith("qweight"))
    assert not differences(state_of(model), state_of(nq.load(tmp_path / "svdq.safetensors")))


def test_a_bias_of_one_of_several_linears_is_not_lost(tmp_path: Path):
    """Files that hold one may be read into a class that has none."""
    model, _ = quantized("z_image")
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")

    def add(tensors: dict, _: dict) -> None:
        bias = torch.zeros(3 * model.config.dim).bfloat16()
        bias[model.config.dim:2 * model.config.dim] = 0.5  # of to_k
        tensors["layers.0.attention.to_qkv.bias"] = packing.pack_vector(bias, 1)

    path = rewritten(tmp_path / "svdq.safetensors", tmp_path / "biased.safetensors", add)
    back = nq.load(path)
    attention = back.layers[0].attention
    assert attention.to_q.bias is None and bool((attention.to_k.bias == 0.5).all())
    nq.export(back, tmp_path / "again.safetensors", "nunchaku")
    assert not differences(contents(path)[0], contents(tmp_path / "again.safetensors")[0])


@pytest.mark.parametrize("rule", ["noise_refiner.*", "noise_refiner.0.attention.*"])
def test_refiners_are_quantized_all_or_none(rule: str, tmp_path: Path):
    model, _ = quantized("z_image", **{rule: "keep"})
    with pytest.raises(nq.NunchakuError, match="noise_refiner.0.attention.to_qkv: is in 16 bit and .* is not: Nunch"):
        nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")


def test_refiners_in_16_bit(tmp_path: Path):
    model, _ = quantized("z_image", **{"*_refiner.*": "keep"})
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")
    assert json.loads(contents(tmp_path / "svdq.safetensors")[1]["quantization_config"])["skip_refiners"] is True
    assert not differences(state_of(model), state_of(nq.load(tmp_path / "svdq.safetensors")))


def test_refusals_of_modulations_name_them(tmp_path: Path):
    model = randomise(FluxTransformer2DModel(**flux_config(
        num_layers=1, num_single_layers=1, attention_head_dim=48, axes_dims_rope=[16, 16, 16])))
    nq.quantize(model, QUICK)
    with pytest.raises(nq.NunchakuError, match="transformer_blocks.0.norm1.linear: a linear of 96 inputs and 576 out"):
        nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")


def test_a_scale_that_is_too_large_is_named(flux: tuple, tmp_path: Path):  # noqa: F811
    model = randomise(FluxTransformer2DModel(**flux_config(num_layers=1, num_single_layers=1)), dtype=torch.float16)
    nq.quantize(model, QUICK)
    model.transformer_blocks[0].norm1_context.linear.scales.data[0, 0] = 60000
    with pytest.raises(nq.NunchakuError, match="transformer_blocks.0.norm1_context.linear: a scale is too large"):
        nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")


@pytest.mark.parametrize("form", ["nunchaku", "nunchaku_py"])
def test_quantized_linears_compute_in_the_dtype_that_is_asked_for(form: str, flux: tuple, tmp_path: Path):  # noqa: F811
    nq.export(flux[0], tmp_path / "svdq.safetensors", form)
    model = nq.load(tmp_path / "svdq.safetensors", dtype=torch.float16)
    linear = model.transformer_blocks[0].attn.to_q
    assert linear.compute_dtype == linear.weight.dtype == model.dtype == torch.float16
    assert linear.smooth.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [[1], "svdquant", {"quant_method": ["nunchaku_py"]}])
def test_quantization_configs_that_are_none(config: object, tmp_path: Path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(nq.NunchakuError, match="has no quantization_config of ours"):
        nq.load(tmp_path / "transformer")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("[" * 100_000)
    with pytest.raises(nq.NunchakuError, match="cannot be read as JSON"):
        nq.load(tmp_path / "other")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(nq.NunchakuError):
        nq.load(tmp_path)


def test_a_scale_for_all_weights_may_be_a_number_or_a_row_of_one(tmp_path: Path):
    model, _ = quantized("flux", "nvfp4")
    for module in quantized_sites(model):
        if module.site.format == "nvfp4":
            module.set_tensor("channel_scale", torch.full_like(module.channel_scale.data, 0.5))
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")

    def flatten(tensors: dict, _: dict) -> None:
        for name in [name for name in tensors if name.endswith("wtscale")]:
            tensors[name] = tensors[name].reshape(())

    path = rewritten(tmp_path / "svdq.safetensors", tmp_path / "flat.safetensors", flatten)
    assert any(name.endswith("wtscale") for name in contents(path)[0])
    assert not differences(state_of(model), state_of(nq.load(path)))


def test_what_pads_heads_is_made_where_they_are():
    """The meta device stands for a GPU."""
    sana = next(stored for block in SANA.blocks for stored in block.linears if stored.rows == "heads")
    linear = Linear("int4", 64, 64, *(torch.empty(96, size, device="meta") for size in (32, 1)), smooth=torch.ones(64))
    joined = Arrangement(sana, (96, 96, 96)).joined([linear] * 3)
    assert joined.codes.shape == (3 * 128, 32) and joined.scales.device.type == "meta"
