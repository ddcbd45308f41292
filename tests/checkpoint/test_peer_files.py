"""Files made from the description of the format alone, read: the network is the one that the file stands for."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.checkpoint.tensor_file import TensorFile
from nunchaku_py.swap import quantized_sites
from tests.checkpoint.peer_files import PeerFile, Truth
from tests.checks import cast, differences, first
from tests.tiny_models import MODELS

CLOSE = 2e-5  # of fp32 sums in another order, through a whole model


def config_of(model: nn.Module) -> dict:
    return json.loads(model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string())


def flux(file: PeerFile, model: nn.Module, fused: bool = False) -> dict[str, str]:
    """Fills the file; gives diffusers' names → those of the file, where they differ."""
    d, renamed = 128, {}
    for i in range(2):
        p = f"transformer_blocks.{i}."
        for name in ("norm1.linear", "norm1_context.linear"):
            file.linear(p + name, file.modulation(p + name, 6 * d, d, 6))
        for name, modules in (("qkv_proj", ("attn.to_q", "attn.to_k", "attn.to_v")),
                              ("qkv_proj_context", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))):
            file.thirds(tuple(p + m for m in modules), file.w4a4(p + name, 3 * d, d, joined=True))
        file.linear(p + "attn.to_out.0", file.w4a4(p + "out_proj", d, d, fused=fused))
        file.linear(p + "attn.to_add_out", file.w4a4(p + "out_proj_context", d, d))
        for name, module in (("mlp", "ff"), ("mlp_context", "ff_context")):
            file.linear(f"{p}{module}.net.0.proj", file.w4a4(f"{p}{name}_fc1", 4 * d, d))
            file.linear(f"{p}{module}.net.2", file.w4a4(f"{p}{name}_fc2", d, 4 * d, gelu=True))
        renamed |= {f"{p}attn.{n}.weight": f"{p}{n}.weight" for n in ("norm_q", "norm_k", "norm_added_q",
                                                                      "norm_added_k")}
    for i in range(2):
        p = f"single_transformer_blocks.{i}."
        file.linear(p + "norm.linear", file.modulation(p + "norm.linear", 3 * d, d, 3))
        file.thirds(tuple(p + m for m in ("attn.to_q", "attn.to_k", "attn.to_v")),
                    file.w4a4(p + "qkv_proj", 3 * d, d, joined=True))
        file.linear(p + "proj_mlp", file.w4a4(p + "mlp_fc1", 4 * d, d))
        attention = file.w4a4(p + "out_proj", d, d, bias=False)
        mlp = file.w4a4(p + "mlp_fc2", d, 4 * d, gelu=True)
        file.linear(p + "proj_out", Truth(torch.cat((attention.weight, mlp.weight), 1), attention.bias + mlp.bias))
        renamed |= {f"{p}attn.{n}.weight": f"{p}{n}.weight" for n in ("norm_q", "norm_k")}
    return renamed


def qwen_image(file: PeerFile, model: nn.Module) -> dict[str, str]:
    d = 128
    file.long_names = True
    for i in range(2):
        p = f"transformer_blocks.{i}."
        for name in ("img_mod.1", "txt_mod.1"):
            file.linear(p + name, file.modulation(p + name, 6 * d, d, 6))
        for name, modules in (("attn.to_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
                              ("attn.add_qkv_proj", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))):
            file.thirds(tuple(p + m for m in modules), file.w4a4(p + name, 3 * d, d, joined=True))
        for name in ("attn.to_out.0", "attn.to_add_out"):
            file.linear(p + name, file.w4a4(p + name, d, d))
        for name in ("img_mlp", "txt_mlp"):
            file.linear(f"{p}{name}.net.0.proj", file.w4a4(f"{p}{name}.net.0.proj", 4 * d, d))
            file.linear(f"{p}{name}.net.2", file.w4a4(f"{p}{name}.net.2", d, 4 * d, gelu=True))
    return {}


def z_image(file: PeerFile, model: nn.Module, skip: bool = False) -> dict[str, str]:
    """skip: the refiners are in 16 bit, their feed-forwards under other names."""
    d, wide = 96, 256
    file.long_names, file.zero_biases = True, False
    for p in ("layers.0.", "layers.1.", "noise_refiner.0.", "context_refiner.0."):
        if skip and "refiner" in p:
            w1, w2, w3 = (file.normal(*shape, std=0.1) for shape in ((wide, d), (d, wide), (wide, d)))
            file.tensors[p + "feed_forward.net.0.proj.weight"] = torch.cat((w3, w1))
            file.tensors[p + "feed_forward.net.2.weight"] = w2
            for name, weight in (("w1", w1), ("w2", w2), ("w3", w3)):
                file.dense[f"{p}feed_forward.{name}.weight"] = weight.float()
            continue
        file.thirds(tuple(p + f"attention.to_{m}" for m in "qkv"),
                    file.w4a4(p + "attention.to_qkv", 3 * d, d, bias=False, joined=True))
        file.linear(p + "attention.to_out.0", file.w4a4(p + "attention.to_out.0", d, d, bias=False))
        file.thirds((p + "feed_forward.w3", p + "feed_forward.w1"),
                    file.w4a4(p + "feed_forward.net.0.proj", 2 * wide, d, bias=False, joined=True))
        file.linear(p + "feed_forward.w2", file.w4a4(p + "feed_forward.net.2", d, wide, bias=False))
    return {}


def sdxl(file: PeerFile, model: nn.Module) -> dict[str, str]:
    d, file.zero_biases, file.always_channels = 128, False, True
    for name in [name for name, _ in model.named_modules() if name.endswith("transformer_blocks.0")]:
        p = name + "."
        file.thirds(tuple(f"{p}attn1.to_{m}" for m in "qkv"), file.w4a4(p + "attn1.to_qkv", 3 * d, d, bias=False,
                                                                       joined=True))
        file.linear(p + "attn2.to_q", file.w4a4(p + "attn2.to_q", d, d, bias=False))
        for module in ("attn1.to_out.0", "attn2.to_out.0"):
            file.linear(p + module, file.w4a4(p + module, d, d))
        file.linear(p + "ff.net.0.proj", file.w4a4(p + "ff.net.0.proj", 8 * d, d))
        file.linear(p + "ff.net.2", file.w4a4(p + "ff.net.2", d, 4 * d))
    return {}


def sana(file: PeerFile, model: nn.Module) -> dict[str, str]:
    """Sizes that are no multiples of 128: q, k and v are padded one by one; then k and v stand by heads of 32."""
    d, wide, padded, renamed = 96, 240, 128, {}
    for i in range(2):
        p = f"transformer_blocks.{i}."
        packed = file.w4a4(p + "attn.qkv_proj", 3 * padded, d, bias=False, joined=True)
        heads = [padded + 64 * (j // 32) + j % 32 for j in range(d)]
        for module, rows in (("q", list(range(d))), ("k", heads), ("v", [row + 32 for row in heads])):
            file.linear(f"{p}attn1.to_{module}", Truth(packed.weight[rows], packed.bias[rows]))
        file.linear(p + "attn1.to_out.0", file.w4a4(p + "attn.out_proj", d, d))
        file.linear(p + "attn2.to_q", file.w4a4(p + "cross_attn.q_linear", d, d))
        file.linear(p + "attn2.to_out.0", file.w4a4(p + "cross_attn.out_proj", d, d))
        for leaf, value in (("weight", file.normal(2 * d, d, std=0.1)), ("bias", file.normal(2 * d, std=0.1))):
            file.tensors[f"{p}cross_attn.kv_linear.{leaf}"] = value
            for module, part in zip("kv", value.float().chunk(2), strict=True):
                file.dense[f"{p}attn2.to_{module}.{leaf}"] = part
        inverted = file.w4a4(p + "ff.inverted_conv", 2 * wide, d)
        pairs = [2 * j for j in range(wide)] + [2 * j + 1 for j in range(wide)]  # the values, then the gates
        file.linear(p + "ff.conv_inverted", Truth(inverted.weight[pairs], inverted.bias[pairs]))
        file.linear(p + "ff.conv_point", file.w4a4(p + "ff.point_conv", d, wide, bias=False))
        depth, bias = file.normal(2 * wide, 3, 3, 1, std=0.3), file.normal(2 * wide, std=0.1)
        file.tensors |= {p + "ff.depth_conv.weight": depth, p + "ff.depth_conv.bias": bias}
        file.dense[p + "ff.conv_depth.weight"] = depth.float()[pairs].permute(0, 3, 1, 2)
        file.dense[p + "ff.conv_depth.bias"] = bias.float()[pairs]
    return renamed


def sana_model() -> tuple[nn.Module, dict]:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=3, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=3, cross_attention_head_dim=32, cross_attention_dim=96, caption_channels=64,
        sample_size=8, mlp_ratio=2.5)
    return model, MODELS["sana"]()[1]


FAMILIES: dict[str, tuple[Callable, Callable, str]] = {
    "flux": (MODELS["flux"], flux, "NunchakuFluxTransformer2dModel"),
    "qwen_image": (MODELS["qwen_image"], qwen_image, "NunchakuQwenImageTransformer2DModel"),
    "z_image": (MODELS["z_image"], z_image, "NunchakuZImageTransformer2DModel"),
    "sdxl": (MODELS["sdxl"], sdxl, "NunchakuSDXLUNet2DConditionModel"),
    "sana": (sana_model, sana, "NunchakuSanaTransformer2DModel"),
}


def made(name: str, file: PeerFile, path: Path, **how: bool) -> tuple[nn.Module, dict, Path]:
    """(the model that the file stands for, in fp32; forward arguments; the file)"""
    make, fill, peer = FAMILIES[name]
    model, inputs = make()
    file.rest(model, fill(file, model, **how))
    config = config_of(model)
    return file.fill(model), cast(inputs, torch.float32), file.write(path, config, peer)


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad(), nq.backend("torch"):  # whose products of fp32 rows are in fp32
        return first(model(**inputs))


def as_float(value):
    return [item.float() for item in value] if isinstance(value, list) and isinstance(value[0], torch.Tensor) else value


def check(model: nn.Module, inputs: dict, path: Path) -> nn.Module:
    """The file, read, computes what it stands for; written again it is the file. Only the rows that pad SANA's q, k and
    v, which here are random, are made anew: nothing is read out of them."""
    inputs = {name: as_float(value) for name, value in inputs.items()}
    read = nq.load(path, mode="a16", dtype=torch.float32)
    assert type(read) is type(model)
    wanted, got = outputs(model, inputs), outputs(read, inputs)
    assert wanted.isfinite().all() and ((got - wanted).norm() / wanted.norm()).item() < CLOSE
    again = path.with_name("again.safetensors")
    loaded = nq.load(path)
    notes = nq.export(loaded, again, "nunchaku")
    with TensorFile(path) as old, TensorFile(again) as new:
        changed = differences(*({name: file.read(name) for name in file.names()} for file in (old, new)))
        assert not [name for name in changed if ".attn.qkv_proj." not in name], notes
    return loaded


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_network_it_stands_for(name: str, fmt: str, tmp_path: Path):
    model, inputs, path = made(name, PeerFile(fmt), tmp_path / f"svdq-{fmt}.safetensors")
    read = check(model, inputs, path)
    shifted = [site for site in quantized_sites(read) if site.site.shift]
    count = {"flux": 2 * 2 + 2, "qwen_image": 2 * 2}.get(name, 0)
    assert len(shifted) == (count if fmt == "int4" else 0)


@pytest.mark.parametrize("fmt, rank, dtype, long_names", [
    ("int4", 16, torch.float16, False), ("int4", 48, torch.bfloat16, True), ("nvfp4", 128, torch.float16, True)])
def test_ranks_types_and_names(fmt: str, rank: int, dtype: torch.dtype, long_names: bool, tmp_path: Path):
    file = PeerFile(fmt, rank, dtype, long_names)
    model, inputs, path = made("flux", file, tmp_path / "svdq.safetensors")
    if long_names:  # what is written has the short ones, which are the usual of FLUX's files
        read = nq.load(path, mode="a16", dtype=torch.float32)
        wanted, got = outputs(model, inputs), outputs(read, inputs)
        assert ((got - wanted).norm() / wanted.norm()).item() < CLOSE
    else:
        check(model, inputs, path)


def test_fused_smoothing(tmp_path: Path):
    read = check(*made("flux", PeerFile("int4"), tmp_path / "svdq.safetensors", fused=True))
    assert read.transformer_blocks[0].attn.to_out[0].site.divided == "input"


def test_refiners_in_16_bit(tmp_path: Path):
    model, inputs, path = made("z_image", PeerFile("int4"), tmp_path / "svdq.safetensors", skip=True)
    check(model, inputs, path)
    with TensorFile(path.with_name("again.safetensors")) as file:
        assert json.loads(file.metadata["quantization_config"])["skip_refiners"] is True


def test_the_older_folder(tmp_path: Path):
    """Two files and a config.json."""
    from safetensors.torch import save_file

    file = PeerFile("int4")
    model, inputs, path = made("flux", file, tmp_path / "svdq.safetensors")
    folder = tmp_path / "svdq-int4"
    folder.mkdir()
    blocks = {name: tensor for name, tensor in file.tensors.items() if "transformer_blocks." in name}
    save_file(blocks, folder / "transformer_blocks.safetensors")
    save_file({name: tensor for name, tensor in file.tensors.items() if name not in blocks},
              folder / "unquantized_layers.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    (folder / "comfy_config.json").write_text("{}")
    a, b = (nq.load(place).state_dict() for place in (path, folder))
    assert not differences(a, b)


def test_a_text_encoder(tmp_path: Path):
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(vocab_size=32, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2,
                                    feed_forward_proj="gated-gelu", architectures=["T5EncoderModel"]))
    file = PeerFile("int4")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            file.linear(name, file.text_linear(name, *module.weight.shape))
    file.rest(model, {})
    config = config_of(model)
    path = file.write(tmp_path / "awq.safetensors", config, "NunchakuT5EncoderModel")
    check(file.fill(model), {"input_ids": torch.arange(7)[None]}, path)
