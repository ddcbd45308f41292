"""Model folders and their shards; 8-bit floats, read as bfloat16."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nunchaku_py.errors import NunchakuError
from nunchaku_py.stream.sources import open_source
from nunchaku_py.stream.weights import FolderWeights
from tests.stream.test_single_file import assert_reads, config_folder, write
from tests.tiny import MODELS

State = dict[str, torch.Tensor]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> Any:
    return MODELS["wan"]()[0]


@pytest.fixture
def shards(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def test_one_file(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config, weights = open_source(tmp_path)
    assert config["_class_name"] == "WanTransformer3DModel" and weights.label == str(tmp_path)
    assert_reads(weights, dict(model.state_dict()))
    weights.close()


def test_shards(model: Any, shards: Path) -> None:
    assert_reads(FolderWeights(shards), dict(model.state_dict()))


def test_rows(model: Any, shards: Path) -> None:
    weights, name = FolderWeights(shards), "blocks.0.ffn.net.2.weight"
    assert torch.equal(weights.read(name, (3, 9)), model.state_dict()[name][3:9])
    assert weights.read(name, (4, 4)).shape == (0, 256)


def test_a_shard_is_missing(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(NunchakuError, match=f"names the shard {gone.name}, which is not there"):
        FolderWeights(shards)


def test_a_shard_lacks_a_tensor(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[0]
    state = load_file(shard)
    name = next(iter(state))
    save_file({key: tensor for key, tensor in state.items() if key != name}, shard)
    with pytest.raises(NunchakuError, match=f"holds no tensor {name}, which .* says it does"):
        FolderWeights(shards)


def test_a_shard_holds_more(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"more": torch.ones(1)}, shard)
    with pytest.raises(NunchakuError, match="does not name 1 tensors of its shards: more"):
        FolderWeights(shards)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": []}])
def test_a_damaged_index(index: dict, shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(NunchakuError, match="expected a weight_map"):
        FolderWeights(shards)


def test_an_index_that_leaves_its_folder(shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(NunchakuError, match="which is not there"):
        FolderWeights(shards)


def test_two_models_in_a_folder(shards: Path) -> None:
    """The one of the usual name is read, as diffusers does; without one it does not show which."""
    usual = set(FolderWeights(shards).tensors)
    write(shards / "model.fp16.safetensors", {"a": torch.ones(1)})
    assert set(FolderWeights(shards).tensors) == usual
    (shards / INDEX).unlink()
    with pytest.raises(NunchakuError, match="which of them is the model"):
        FolderWeights(shards)


def test_folders_that_are_none(model: Any, tmp_path: Path) -> None:
    with pytest.raises(NunchakuError, match="holds no config.json"):
        open_source(tmp_path)
    config_folder(tmp_path, model)
    with pytest.raises(NunchakuError, match="holds no safetensors file"):
        open_source(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(NunchakuError, match="is a pickle"):
        open_source(tmp_path)
    with pytest.raises(NunchakuError, match="has a config of its own"):
        open_source(tmp_path, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(NunchakuError, match="is a pipeline; name the folder of one of its models"):
        open_source(tmp_path)


def test_a_folder_that_is_quantized(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(NunchakuError, match="is already quantized"):
        open_source(tmp_path)


# -------------------------------------------------------------------------------------------------------- 8-bit floats
@pytest.fixture(scope="module")
def qwen() -> Any:
    return MODELS["qwen_image"]()[0]


def cast(state: State, dtype: torch.dtype = torch.float8_e4m3fn) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def linears(state: State) -> list[str]:
    return [name for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2]


def scaled(state: State, leaf: str, rows: bool = False) -> tuple[State, State]:
    """(as ComfyUI scales weights, what they stand for)"""
    stored, meant = dict(state), dict(state)
    for n, name in enumerate(linears(state)):
        scale = torch.tensor(0.01 * (n + 1)) if not rows else torch.linspace(0.01, 0.02, state[name].shape[0])[:, None]
        stored[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + leaf] = scale
        meant[name] = (stored[name].float() * scale).bfloat16()
    return stored, meant


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_plain_cast(dtype: torch.dtype, qwen: Any, tmp_path: Path) -> None:
    stored = cast(dict(qwen.state_dict()), dtype)
    folder = config_folder(tmp_path / "config", qwen)
    _, weights = open_source(write(tmp_path / "m.safetensors", stored), folder)
    assert_reads(weights, {name: tensor.bfloat16() for name, tensor in stored.items()})
    write(folder / "diffusion_pytorch_model.safetensors", stored)
    assert_reads(open_source(folder)[1], {name: tensor.bfloat16() for name, tensor in stored.items()})


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
def test_scales(leaf: str, rows: bool, qwen: Any, tmp_path: Path) -> None:
    stored, meant = scaled(dict(qwen.state_dict()), leaf, rows)
    name = linears(stored)[0].removesuffix("weight")
    more = {f"{name}scale_input": torch.ones(()), f"{name}input_scale": torch.ones(()),
            "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
            f"{name}comfy_quant": torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
    path = write(tmp_path / "m.safetensors", stored | more)
    _, weights = open_source(path, config_folder(tmp_path / "config", qwen))
    assert_reads(weights, meant)


def test_scales_of_rows_follow_the_rows(tmp_path: Path) -> None:
    model = MODELS["sd3"]()[0]
    from tests.stream.makers import sd3

    stored, meant = scaled(sd3(dict(model.state_dict())), "weight_scale", rows=True)
    _, weights = open_source(write(tmp_path / "m.safetensors", stored), config_folder(tmp_path / "config", model))
    wanted = meant["joint_blocks.1.x_block.attn.qkv.weight"].chunk(3)[1]
    assert torch.equal(weights.read("transformer_blocks.1.attn.to_k.weight"), wanted)


@pytest.mark.parametrize(("change", "said"), [
    (lambda s, n: {"scaled_fp8": torch.ones(2), n + "scale_weight": None}, "has no scale, and the file says"),
    (lambda s, n: {n + "scale_weight": torch.ones(2)}, "expected one scale, or one for each of"),
    (lambda s, n: {n + "scale_weight": torch.ones(1, dtype=torch.int32)}, "expected one scale"),
    (lambda s, n: {n + "scale_weight": None, n + "weight_scale_inv": torch.ones(1)}, "that this release does not know"),
    (lambda s, n: {n + "comfy_quant": torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
     "quantized as nvfp4"),
    (lambda s, n: {n + "comfy_quant": torch.ones(3, dtype=torch.uint8)}, "expected a JSON object with a format"),
])
def test_scales_that_are_not_known(change: Any, said: str, qwen: Any, tmp_path: Path) -> None:
    stored, _ = scaled(dict(qwen.state_dict()), "scale_weight")
    stored |= change(stored, linears(dict(qwen.state_dict()))[0].removesuffix("weight"))
    path = write(tmp_path / "m.safetensors", {name: tensor for name, tensor in stored.items() if tensor is not None})
    with pytest.raises(NunchakuError, match=said):
        open_source(path, config_folder(tmp_path / "config", qwen))


def test_integers_of_comfyui(qwen: Any, tmp_path: Path) -> None:
    state = dict(qwen.state_dict())
    name = linears(state)[0]
    state[name] = state[name].to(torch.int8)
    state[f"{name.removesuffix('weight')}comfy_quant"] = torch.frombuffer(
        bytearray(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    with pytest.raises(NunchakuError, match="quantized as int8_tensorwise"):
        open_source(write(tmp_path / "m.safetensors", state), config_folder(tmp_path / "config", qwen))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_none(value: float, qwen: Any, tmp_path: Path) -> None:
    stored, _ = scaled(dict(qwen.state_dict()), "scale_weight")
    name = linears(dict(qwen.state_dict()))[0]
    stored[name.removesuffix("weight") + "scale_weight"] = torch.tensor(value)
    path = write(tmp_path / "m.safetensors", stored)
    _, weights = open_source(path, config_folder(tmp_path / "config", qwen))
    with pytest.raises(NunchakuError, match="expected positive scales"):
        weights.read(name)


@pytest.mark.parametrize(("text", "said"), [
    ('{"layers": {"a": {"format": "mxfp8"}}}', "quantized as mxfp8"), ("[]", "cannot be understood"),
    ('{"layers": {"a": {"format": "float8_e4m3fn", "convrot": true}}}', "quantized as float8_e4m3fn with convrot"),
    ('{"layers": {"a": 3}}', "expected a JSON object with a format"),
])
def test_formats_in_the_metadata(text: str, said: str, qwen: Any, tmp_path: Path) -> None:
    save_file(cast(dict(qwen.state_dict())), tmp_path / "m.safetensors", {"_quantization_metadata": text})
    with pytest.raises(NunchakuError, match=said):
        open_source(tmp_path / "m.safetensors", config_folder(tmp_path / "config", qwen))
