"""Single files with their makers' names: configs that are found, tensors that are read as diffusers would have them."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nunchaku_py.errors import NunchakuError
from nunchaku_py.stream.sources import open_source
from tests.stream import makers
from tests.tiny import MODELS, TEXT_ENCODERS

State = dict[str, torch.Tensor]
FOREIGN: dict[str, Callable[[State], State]] = {
    "sd3": makers.sd3, "sdxl": lambda state: makers.unet(state, 1), "z_image": makers.z_image, "wan": makers.wan,
    "qwen_image": dict,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may so much as try to reach a hub."""
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


def config_folder(folder: Path, model: Any) -> Path:
    model.save_config(folder)
    return folder


def write(path: Path, state: State) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def saved(name: str, tmp_path: Path, prefix: str = "") -> tuple[Path, Path, State]:
    """(file with its makers' names, folder with a config, the state in diffusers' names)"""
    model, _ = MODELS[name]()
    state = dict(model.state_dict())
    path = write(tmp_path / "model.safetensors", makers.prefixed(FOREIGN[name](state), prefix))
    return path, config_folder(tmp_path / "config", model), state


def assert_reads(weights: Any, state: State) -> None:
    assert set(weights.tensors) == set(state)
    for name, tensor in state.items():
        read, header = weights.read(name), weights.tensors[name]
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype, name
        assert header.shape == tuple(tensor.shape) and header.nbytes == tensor.nbytes, name
        assert read.is_contiguous() and read.untyped_storage().nbytes() == read.nbytes, name


@pytest.mark.parametrize("prefix", ["", makers.PREFIX, "diffusion_model."])
@pytest.mark.parametrize("name", FOREIGN)
def test_whole_models_are_read_as_diffusers_has_them(name: str, prefix: str, tmp_path: Path) -> None:
    path, folder, state = saved(name, tmp_path, prefix)
    config, weights = open_source(path, folder)
    assert config["_class_name"] == json.loads((folder / "config.json").read_text())["_class_name"]
    assert_reads(weights, state)
    assert weights.notes == ()
    weights.close()


@pytest.mark.parametrize("name", ["flux", "sdxl", "pixart"])
def test_files_with_diffusers_names(name: str, tmp_path: Path) -> None:
    model, _ = MODELS[name]()
    state = dict(model.state_dict())
    _, weights = open_source(write(tmp_path / "m.safetensors", state), config_folder(tmp_path / "config", model))
    assert_reads(weights, state)


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoders(name: str, tmp_path: Path) -> None:
    """Of parameters with two names a file holds one."""
    TEXT_ENCODERS[name]()[0].save_pretrained(tmp_path)
    _, weights = open_source(tmp_path / "model.safetensors", tmp_path)
    assert_reads(weights, load_file(tmp_path / "model.safetensors"))


def test_a_pipelines_folder_has_the_config(tmp_path: Path) -> None:
    path, folder, state = saved("sd3", tmp_path)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    folder.rename(pipeline / "transformer")
    assert_reads(open_source(path, pipeline)[1], state)


def test_other_models_of_the_file_are_left_and_named(tmp_path: Path) -> None:
    path, folder, state = saved("sdxl", tmp_path)
    foreign = makers.prefixed(makers.unet(state, 1))
    more = {"first_stage_model.quant_conv.weight": torch.ones(4), "conditioner.embedders.0.a.weight": torch.ones(3)}
    _, weights = open_source(write(path, foreign | more), folder)
    assert_reads(weights, state)
    assert weights.notes == ("2 tensors are of other models: conditioner.embedders.0.a.weight, "
                             "first_stage_model.quant_conv.weight",)


def test_what_a_converter_drops_is_named(tmp_path: Path) -> None:
    path, folder, state = saved("z_image", tmp_path)
    _, weights = open_source(write(path, makers.z_image(state) | {"norm_final.weight": torch.ones(4)}), folder)
    assert_reads(weights, state)
    assert weights.notes == ("1 tensors are no part of the model: norm_final.weight",)


# ------------------------------------------------------------------------------------------- configs from shapes alone
def whole_flux(**more: Any) -> State:
    """Of FLUX.1's width, without values."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    config = dict(num_layers=2, num_single_layers=3, guidance_embeds=True) | more
    with init_empty_weights():
        return dict(FluxTransformer2DModel(**config).bfloat16().state_dict())


def bits(shape: torch.Size, seed: int) -> torch.Tensor:
    """Numbers without a pattern, none of them NaN."""
    count = shape.numel()
    return ((torch.arange(count) * 7919 + seed) % 31000).to(torch.int16).view(torch.bfloat16).reshape(shape)


@pytest.mark.parametrize("more", [{}, {"guidance_embeds": False}, {"in_channels": 384, "out_channels": 64}])
def test_the_config_of_flux_is_found(more: dict[str, Any], tmp_path: Path) -> None:
    own = whole_flux(**more)
    foreign = makers.flux(own)
    changed = ["double_blocks.1.img_attn.qkv.weight", "single_blocks.2.linear1.bias",
               "final_layer.adaLN_modulation.1.weight", "double_blocks.0.txt_attn.norm.key_norm.scale"]
    for seed, name in enumerate(changed):
        foreign[name] = bits(foreign[name].shape, seed)
    makers.sparse(tmp_path / "flux.safetensors", makers.prefixed(foreign))
    config, weights = open_source(tmp_path / "flux.safetensors")
    wanted = dict(in_channels=64, out_channels=64, guidance_embeds=True) | more
    assert config | wanted == config and config["num_layers"] == 2 and config["num_single_layers"] == 3
    assert {name: header.shape for name, header in weights.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in own.items()}
    q, k, v = foreign[changed[0]].chunk(3)
    for name, rows in {"to_q": q, "to_k": k, "to_v": v}.items():
        assert torch.equal(weights.read(f"transformer_blocks.1.attn.{name}.weight"), rows)
    assert torch.equal(weights.read("single_transformer_blocks.2.proj_mlp.bias"), foreign[changed[1]][3 * 3072:])
    shift, scale = foreign[changed[2]].chunk(2)
    assert torch.equal(weights.read("norm_out.linear.weight"), torch.cat([scale, shift]))
    assert torch.equal(weights.read("transformer_blocks.0.attn.norm_added_k.weight"), foreign[changed[3]])


def test_the_config_of_flux_is_found_in_diffusers_names(tmp_path: Path) -> None:
    own = whole_flux()
    makers.sparse(tmp_path / "flux.safetensors", own)
    config, weights = open_source(tmp_path / "flux.safetensors")
    assert config["num_layers"] == 2 and config["num_attention_heads"] == 24 and set(weights.tensors) == set(own)


def whole_sdxl(**more: Any) -> State:
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    config = dict(
        in_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    with init_empty_weights():
        return dict(UNet2DConditionModel(**config | more).half().state_dict())


@pytest.mark.parametrize("prefix", ["", makers.PREFIX])
def test_the_config_of_sdxl_is_found(prefix: str, tmp_path: Path) -> None:
    own = whole_sdxl()
    foreign = makers.unet(own, 2)
    name = "output_blocks.0.1.transformer_blocks.9.attn2.to_k.weight"
    foreign[name] = bits(foreign[name].shape, 3).view(torch.float16)
    makers.sparse(tmp_path / "sdxl.safetensors", makers.prefixed(foreign, prefix))
    config, weights = open_source(tmp_path / "sdxl.safetensors")
    assert config["transformer_layers_per_block"] == [1, 2, 10] and set(weights.tensors) == set(own)
    assert torch.equal(weights.read("up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_k.weight"), foreign[name])


def test_a_smaller_sdxl_needs_its_config(tmp_path: Path) -> None:
    own = whole_sdxl(transformer_layers_per_block=[1, 2, 4])
    makers.sparse(tmp_path / "sdxl.safetensors", makers.unet(own, 2))
    with pytest.raises(NunchakuError, match=r"\d+ tensors are missing: .*was found from its shapes; --config"):
        open_source(tmp_path / "sdxl.safetensors")


@pytest.mark.parametrize(("name", "said"), [("sd3", "none that are known|may be a"), ("wan", "may be a wan-i2v-14B")])
def test_other_models_need_a_config(name: str, said: str, tmp_path: Path) -> None:
    path, _, _ = saved(name, tmp_path)
    with pytest.raises(NunchakuError, match=rf"does not show in its tensors \(.*({said})\).*--config MODEL_DIR"):
        open_source(path)


# ------------------------------------------------------------------------------------------------------------- damages
def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    path, folder, _ = saved("sd3", tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(NunchakuError, match="cut short or damaged"):
        open_source(path, folder)


@pytest.mark.parametrize(("name", "gone", "said"), [
    ("sd3", "joint_blocks.1.x_block.mlp.fc2.bias", "lacks the tensor joint_blocks.1.x_block.mlp.fc2.bias"),
    ("wan", "head.head.bias", "1 tensors are missing: proj_out.bias"),
    ("sdxl", "middle_block.1.norm.bias", "1 tensors are missing: mid_block.attentions.0.norm.bias"),
])
def test_a_tensor_is_missing(name: str, gone: str, said: str, tmp_path: Path) -> None:
    path, folder, state = saved(name, tmp_path)
    foreign = FOREIGN[name](state)
    del foreign[gone]
    with pytest.raises(NunchakuError, match=said):
        open_source(write(path, foreign), folder)


def test_a_tensor_has_another_shape(tmp_path: Path) -> None:
    path, folder, state = saved("wan", tmp_path)
    foreign = makers.wan(state)
    foreign["blocks.0.ffn.2.weight"] = foreign["blocks.0.ffn.2.weight"][:, :-1]
    with pytest.raises(NunchakuError, match=r"blocks.0.ffn.net.2.weight: expected \(128, 256\) .*got \(128, 255\)"):
        open_source(write(path, foreign), folder)


def test_a_tensor_that_cannot_be_split(tmp_path: Path) -> None:
    path, folder, state = saved("sd3", tmp_path)
    foreign = makers.sd3(state)
    foreign["joint_blocks.0.x_block.attn.qkv.weight"] = torch.ones(2, 128)
    with pytest.raises(NunchakuError, match="is no SD3Transformer2DModel that diffusers converts: not enough values"):
        open_source(write(path, foreign), folder)


def test_a_tensor_that_nobody_knows(tmp_path: Path) -> None:
    path, folder, state = saved("wan", tmp_path)
    with pytest.raises(NunchakuError, match="1 tensors are unexpected: blocks.0.extra"):
        open_source(write(path, makers.wan(state) | {"blocks.0.extra": torch.ones(2)}), folder)


def test_a_converter_that_looks_at_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    path, folder, _ = saved("sd3", tmp_path)

    def convert(checkpoint: State, **kwargs: Any) -> State:
        return {name: tensor for name, tensor in checkpoint.items() if tensor.sum().item() != 0}

    monkeypatch.setitem(SINGLE_FILE_LOADABLE_CLASSES, "SD3Transformer2DModel", {"checkpoint_mapping_fn": convert})
    with pytest.raises(NunchakuError, match="cannot be read tensor by tensor as a SD3Transformer2DModel"):
        open_source(path, folder)


@pytest.mark.parametrize(("more", "said"), [
    ({"blocks.0.a.qweight": torch.ones(2, dtype=torch.int8)}, r"already quantized \(it holds blocks.0.a.qweight, I8\)"),
    ({"a.weight.absmax": torch.ones(2)}, "already quantized"),
    ({"a.weight.quant_state.bitsandbytes__nf4": torch.ones(2, dtype=torch.uint8)}, "already quantized"),
    ({"a.codes": torch.ones(2, dtype=torch.uint8)}, "already quantized"),
    ({"a.weight_scale_2": torch.ones(1)}, "already quantized"),
    ({"a.lora_A.weight": torch.ones(1, 2)}, "is a LoRA, no model"),
])
def test_what_is_quantized_is_refused(more: State, said: str, tmp_path: Path) -> None:
    path, folder, state = saved("wan", tmp_path)
    with pytest.raises(NunchakuError, match=said):
        open_source(write(path, makers.wan(state) | more), folder)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    path, folder, state = saved("wan", tmp_path)
    foreign = makers.wan(state)
    foreign["blocks.0.ffn.2.weight"] = foreign["blocks.0.ffn.2.weight"].to(torch.int8)
    with pytest.raises(NunchakuError, match="blocks.0.ffn.net.2.weight: expected one of BF16, F16, F32, got I8"):
        open_source(write(path, foreign), folder)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    path, folder, _ = saved("wan", tmp_path)
    _, weights = open_source(path, folder)
    with pytest.raises(NunchakuError, match="holds no tensor nothing"):
        weights.read("nothing")
    with pytest.raises(NunchakuError, match="no such file"):
        open_source(tmp_path / "absent.safetensors")
    with pytest.raises(NunchakuError, match="expected the folder of a model or pipeline"):
        open_source(path, tmp_path / "absent")
    (tmp_path / "old.ckpt").write_bytes(b"PK")
    with pytest.raises(NunchakuError, match="is a pickle"):
        open_source(tmp_path / "old.ckpt")
