"""Every way of damaging one of Nunchaku's files ends in a sentence that names the file and the tensor."""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nunchaku_py as nq
from nunchaku_py.checkpoint.tensor_file import TensorFile, layout_of, write_tensors
from tests.checks import QUICK, QUICK_NVFP4
from tests.tiny_models import MODELS

Change = Callable[[dict[str, Tensor], dict[str, str]], None]
BLOCK, SINGLE = "transformer_blocks.1.", "single_transformer_blocks.0."


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = MODELS["flux"]()
    nq.quantize(model, {"int4": QUICK, "nvfp4": QUICK_NVFP4}[request.param])
    path = tmp_path_factory.mktemp(request.param) / f"svdq-{request.param}.safetensors"
    nq.export(model, path, "nunchaku")
    return path


def damaged(good: Path, to: Path, change: Change) -> Path:
    with TensorFile(good) as file:
        tensors, metadata = {name: file.read(name) for name in file.names()}, dict(file.metadata)
    change(tensors, metadata)
    write_tensors(to, layout_of(tensors), tensors.items(), metadata)
    return to


def refused(path: Path, match: str) -> str:
    with pytest.raises(nq.NunchakuError, match=match) as error:
        nq.load(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


PACKED = [f"{BLOCK}{name}.{leaf}" for name, leaves in {
    "qkv_proj": ("qweight", "wscales", "smooth", "lora_down", "lora_up"),
    "norm1.linear": ("qweight", "wscales", "wzeros"), "mlp_fc2": ("qweight", "wscales", "smooth"),
}.items() for leaf in leaves] + [f"{SINGLE}{name}" for name in (
    "out_proj.wscales", "mlp_fc2.lora_up", "norm.linear.wzeros")]


def fit(name: str) -> str:
    """Where a modulation loses its wzeros it looks like a W4A4 linear, and the sentence is about that."""
    return name.removesuffix(".wzeros") if name.endswith("wzeros") else name


@pytest.mark.parametrize("name", PACKED)
def test_missing(name: str, good: Path, tmp_path: Path):
    refused(damaged(good, tmp_path / "a.safetensors", lambda tensors, _: tensors.pop(name)), re.escape(fit(name)))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("how", ["rows", "columns", "axes", "dtype"])
def test_wrong_shape_or_dtype(name: str, how: str, good: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        old = tensors[name]
        tensors[name] = {"rows": lambda: torch.cat((old, old[:1])), "axes": lambda: old[None],
                         "columns": lambda: old[..., :-1].contiguous(), "dtype": lambda: old.to(torch.float64)}[how]()

    said = refused(damaged(good, tmp_path / "a.safetensors", change), re.escape(name.rpartition(".")[0]))
    assert "expected" in said and "got" in said


@pytest.mark.parametrize("leaf", ["wscales", "smooth", "lora_down", "lora_up", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(leaf: str, value: float, good: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata.pop("nunchaku_py")
        for name in (f"{BLOCK}mlp_fc1.{leaf}", f"{BLOCK}mlp_fc1.smooth_orig") if leaf == "smooth" else (
                f"{BLOCK}mlp_fc1.{leaf}",):
            tensor = tensors[name].float()
            tensor.view(-1)[5] = value
            tensors[name] = tensor.to(tensors[name].dtype)

    if leaf == "wscales" and "nvfp4" in good.name and value == float("inf"):
        value = float("nan")  # e4m3 has no infinity
    said = refused(damaged(good, tmp_path / "a.safetensors", change), "NaN or infinite|must be positive")
    assert f"{BLOCK}ff.net.0.proj" in said  # the module's name: which tensor of the file is not known any more


@pytest.mark.parametrize("name, value", [("mlp_fc2.bias", "nan"), ("out_proj.wscales", "nan"), ("mlp_fc2.smooth", "0")])
def test_parts(name: str, value: str, good: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata.pop("nunchaku_py")
        tensor = tensors[SINGLE + name].float()
        tensor.view(-1)[0] = float(value)
        tensors[SINGLE + name] = tensor.to(tensors[SINGLE + name].dtype)

    refused(damaged(good, tmp_path / "a.safetensors", change), f"{SINGLE}proj_out")


@pytest.mark.parametrize("name", ["extra", f"{BLOCK}extra.weight", f"{BLOCK}qkv_proj.extra", f"{BLOCK}extra.qweight"])
def test_unexpected(name: str, good: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[name] = torch.zeros(128, 64, dtype=torch.int8)

    refused(damaged(good, tmp_path / "a.safetensors", change), re.escape(name))


@pytest.mark.parametrize("name", ["x_embedder.weight", f"{BLOCK}norm_q.weight"])
@pytest.mark.parametrize("how", ["missing", "shape", "dtype"])
def test_tensors_in_16_bit(name: str, how: str, good: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        old = tensors.pop(name)
        if how != "missing":
            tensors[name] = old[:-1].clone() if how == "shape" else old.to(torch.int32)

    refused(damaged(good, tmp_path / "a.safetensors", change), re.escape(name.rpartition(".")[0].rpartition(".")[2]))


def test_ranks_that_kernels_cannot_read(good: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for leaf in ("lora_down", "lora_up"):
            tensors[f"{BLOCK}out_proj.{leaf}"] = tensors[f"{BLOCK}out_proj.{leaf}"][:, :8].contiguous()

    refused(damaged(good, tmp_path / "a.safetensors", change), f"{BLOCK}out_proj.*multiple of 16, got 8")


@pytest.mark.parametrize("value, match", [
    (None, "holds no model configuration"), ("{", "holds no model configuration"), ("[]", "expected a JSON object"),
    ("[" * 9999, "holds no model configuration"), ('{"num_layers": 1}', "qweight: expected"),
    ('{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}', "does not describe a FluxTransformer2DModel"),
    ('{"_class_name": "FluxTransformer2DModel", "num_layers": 99999999}', "num_layers"),
    ('{"_class_name": "QwenImageTransformer2DModel"}', "svdq|missing"),
])
def test_configurations(value: str | None, match: str, good: Path, tmp_path: Path):
    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata.pop("config")
        if value is not None:
            metadata["config"] = value
        if "Qwen" in str(value):
            metadata.pop("model_class")

    refused(damaged(good, tmp_path / "a.safetensors", change), match)


@pytest.mark.parametrize("value", ["", "{", "[]", '{"sites": 3}', '{"sites": {"x": {"kind": 3}}}',
                                   '{"sites": {}, "biases": 3}'])
def test_our_own_entry(value: str, good: Path, tmp_path: Path):
    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["nunchaku_py"] = value

    refused(damaged(good, tmp_path / "a.safetensors", change), "nunchaku_py")


def test_an_exact_bias_that_is_garbled(good: Path, tmp_path: Path):
    name = "transformer_blocks.0.norm1.linear"

    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        own = json.loads(metadata["nunchaku_py"])
        own["biases"][name] = "bfloat16:!"
        metadata["nunchaku_py"] = json.dumps(own)

    refused(damaged(good, tmp_path / "a.safetensors", change), f"{name}: the bias in the metadata")


@pytest.mark.parametrize("size", [0, 4, 8, 1000, 200_000, -1])
def test_cut_short(size: int, good: Path, tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(good.read_bytes()[:size])
    refused(path, "cut short|not a safetensors file")
