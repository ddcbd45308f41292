"""Nunchaku's files that are damaged or say what cannot be: each refused in a sentence that names the file, and the
tensor where there is one."""
from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import nunchaku_py as nq
from tests.peer.files import PeerFile, Recipe, make, write

BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
W4A4 = ("qweight", "wscales", "bias", "smooth", "lora_down", "lora_up")  # without smooth_orig, which nothing needs
AWQ = ("qweight", "wscales", "wzeros", "bias")
LINEARS = {  # one of each kind: joined, after a GELU, one module in two parts
    f"{BLOCK}.qkv_proj": W4A4, f"{BLOCK}.out_proj_context": W4A4, f"{BLOCK}.mlp_fc2": W4A4, f"{SINGLE}.out_proj": W4A4,
    f"{SINGLE}.mlp_fc2": W4A4, f"{BLOCK}.norm1.linear": AWQ, f"{SINGLE}.norm.linear": AWQ,
}
EVERY = [f"{name}.{leaf}" for name, leaves in LINEARS.items() for leaf in leaves]
W4A4_TENSORS = [name for name in EVERY if ".norm" not in name]
PLAIN = [f"{BLOCK}.norm_q.weight", f"{SINGLE}.norm_k.weight", "x_embedder.weight", "norm_out.linear.bias",
         "time_text_embed.guidance_embedder.linear_1.weight"]
JOINED = f"{BLOCK}.qkv_proj"
MODULES = {  # which of diffusers' modules a refusal may name instead
    JOINED: f"{BLOCK}.attn.to_", f"{BLOCK}.out_proj_context": f"{BLOCK}.attn.to_add_out",
    f"{BLOCK}.mlp_fc2": f"{BLOCK}.ff.net.2", f"{SINGLE}.out_proj": f"{SINGLE}.proj_out",
    f"{SINGLE}.mlp_fc2": f"{SINGLE}.proj_out", f"{BLOCK}.mlp_fc1": f"{BLOCK}.ff.net.0.proj",
}
State = dict[str, Tensor]


@cache
def made(precision: str) -> PeerFile:
    return make(Recipe("flux", precision, rank=16))


@pytest.fixture(params=["int4", "nvfp4"])
def good(request: pytest.FixtureRequest) -> PeerFile:
    """Not to be changed."""
    return made(request.param)


def of_both(names: list[str]) -> pytest.MarkDecorator:
    """Every tensor in INT4's file; in NVFP4's those that are other tensors there."""
    cases = [("int4", name) for name in names] + [("nvfp4", name) for name in names if name in W4A4_TENSORS]
    return pytest.mark.parametrize(("good", "name"), cases, indirect=["good"])


def refused(peer: PeerFile, to: Path, name: str, change: Callable[[State], Any], metadata: dict | None = None) -> str:
    """A file whose tensors went through `change` is refused by a sentence that names the file and the tensor."""
    tensors, path = dict(peer.tensors), to / "damaged.safetensors"
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path,
              metadata=peer.metadata if metadata is None else metadata)
    return refused_file(path, name)


def refused_file(path: Path, name: str = "") -> str:
    with pytest.raises(nq.NunchakuError) as caught:
        nq.load(path)
    text, linear = str(caught.value), name.rpartition(".")[0]
    assert str(path) in text
    assert name in text or (linear in MODULES and MODULES[linear] in text), text
    return text


# ----------------------------------------------------------------------------------------------------- single tensors
@of_both(EVERY + PLAIN)
def test_a_tensor_is_missing(good: PeerFile, tmp_path: Path, name: str) -> None:
    if name.endswith(("wzeros", "bias")) and ".norm" in name:  # the sentence is about the linear
        refused(good, tmp_path, name.rpartition(".")[0], lambda state: state.pop(name))
    else:
        where = name.replace(".norm_", ".attn.norm_") if "norm_q" in name or "norm_k" in name else name
        refused(good, tmp_path, where, lambda state: state.pop(name))


@pytest.mark.parametrize("name", sorted(LINEARS))
def test_a_whole_linear_is_missing(good: PeerFile, tmp_path: Path, name: str) -> None:
    def change(state: State) -> None:
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
    refused(good, tmp_path, f"{name}.qweight" if ".norm" not in name else name, change)


@of_both(EVERY + PLAIN)
def test_a_shape_is_wrong(good: PeerFile, tmp_path: Path, name: str) -> None:
    def longer(state: State) -> None:
        state[name] = torch.cat([state[name].view(torch.uint8)] * 2).view(state[name].dtype)
    where = name.replace(".norm_", ".attn.norm_") if "norm_q" in name or "norm_k" in name else name
    for change in (longer, lambda state: state.update({name: state[name][None]}),
                   lambda state: state.update({name: state[name].reshape(-1)[0]})):
        refused(good, tmp_path, where, change)


@of_both(EVERY + PLAIN)
def test_a_dtype_is_wrong(good: PeerFile, tmp_path: Path, name: str) -> None:
    where = name.replace(".norm_", ".attn.norm_") if "norm_q" in name or "norm_k" in name else name
    for dtype in (torch.float64, torch.int64):
        if dtype == torch.float64 and name in PLAIN:  # a model may be in any floating-point type
            continue
        refused(good, tmp_path, where, lambda state, dtype=dtype: state.update({name: state[name].float().to(dtype)}))


@of_both([name for name in EVERY if not name.endswith("qweight")])
def test_a_number_is_nan(good: PeerFile, tmp_path: Path, name: str) -> None:
    refused(good, tmp_path, _named(name), lambda state: state.update({name: _first(state[name], float("nan"))}))


@pytest.mark.parametrize("name", [f"{linear}.{leaf}" for linear in (JOINED, f"{BLOCK}.norm1.linear")
                                  for leaf in LINEARS[linear] if leaf != "qweight"])
def test_a_number_is_infinite(tmp_path: Path, name: str) -> None:
    for value in (float("inf"), float("-inf")):
        refused(made("int4"), tmp_path, _named(name),
                lambda state, value=value: state.update({name: _first(state[name], value)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_second_scale_is_not_finite(tmp_path: Path, value: float) -> None:
    peer = make(Recipe("flux", "nvfp4", rank=16))
    for name in (f"{JOINED}.wcscales", f"{BLOCK}.mlp_fc1.wtscale"):
        refused(peer, tmp_path, name, lambda state, name=name: state.update({name: _first(state[name], value)}))


def _named(name: str) -> str:
    """AWQ's are called in a file as in the model."""
    return name.rpartition(".")[0] if ".norm" in name else name


def _first(tensor: Tensor, value: float) -> Tensor:
    """With one number changed, the first, which no padding is."""
    changed = tensor.clone()
    flat = changed.float().flatten()
    flat[0] = value
    return flat.to(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("linear", [name for name, leaves in LINEARS.items() if leaves is W4A4])
def test_smoothing_by_zero(good: PeerFile, tmp_path: Path, linear: str) -> None:
    name = f"{linear}.smooth"
    refused(good, tmp_path, name, lambda state: state.update({name: _first(state[name], 0.0)}))


@pytest.mark.parametrize("rank", [1, 8, 17, 40])
def test_a_rank_is_no_multiple_of_16(good: PeerFile, tmp_path: Path, rank: int) -> None:
    def change(state: State) -> None:
        for leaf in ("lora_down", "lora_up"):
            rows = state[f"{JOINED}.{leaf}"].shape[0]
            state[f"{JOINED}.{leaf}"] = torch.zeros(rows, rank, dtype=torch.bfloat16)
    assert "16" in refused(good, tmp_path, JOINED, change)


@pytest.mark.parametrize("name", [f"{BLOCK}.qkv_proj.extra", f"{BLOCK}.norm1.linear.smooth", f"{BLOCK}.mlp_fc3.qweight",
                                  "transformer_blocks.7.qkv_proj.qweight", "x_embedder.qweight", "nothing", "a..b",
                                  f"{BLOCK}.attn.to_q.weight", f"{BLOCK}.qkv_proj.weight"])
def test_a_tensor_too_many(good: PeerFile, tmp_path: Path, name: str) -> None:
    refused(good, tmp_path, name, lambda state: state.update({name: torch.zeros(3, 5)}))


def test_both_of_two_spellings(good: PeerFile, tmp_path: Path) -> None:
    def change(state: State) -> None:
        state[f"{JOINED}.proj_down"] = state[f"{JOINED}.lora_down"].clone()
    refused(good, tmp_path, JOINED, change)


def test_linears_of_two_precisions_side_by_side(tmp_path: Path) -> None:
    """Scales of 8 bits, but as many as INT4 has; and the other way round."""
    for precision, dtype in (("int4", torch.float8_e4m3fn), ("nvfp4", torch.bfloat16)):
        peer, name = make(Recipe("flux", precision, rank=16)), f"{JOINED}.wscales"
        refused(peer, tmp_path, name, lambda state, dtype=dtype: state.update(  # noqa: B023
            {name: state[name].float().to(dtype)}))  # noqa: B023


# ---------------------------------------------------------------------------------------------------------- the file
@pytest.mark.parametrize("keep", [0, 4, 7, 8, 9, 100, 5000, -1, -1000])
def test_a_file_is_cut_short(good: PeerFile, tmp_path: Path, keep: int) -> None:
    path = write(good, tmp_path).path
    path.write_bytes(path.read_bytes()[:keep])
    refused_file(path)


@pytest.mark.parametrize("name", ["transformer_blocks.safetensors", "unquantized_layers.safetensors", "config.json"])
def test_a_file_of_a_folder_is_missing_or_cut_short(tmp_path: Path, name: str) -> None:
    path = write(make(Recipe("flux", legacy=True, rank=16)), tmp_path).path
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    refused_file(path)
    (path / name).unlink()
    refused_file(path)


def config_of(peer: PeerFile, **changes: object) -> dict[str, str]:
    return {**peer.metadata, "config": json.dumps({**json.loads(peer.metadata["config"]), **changes})}


METADATA: dict[str, Callable[[PeerFile], dict[str, str]]] = {
    "none": lambda peer: {},
    "no config": lambda peer: {key: value for key, value in peer.metadata.items() if key != "config"},
    "config is no JSON": lambda peer: {**peer.metadata, "config": "{'a': 1"},
    "config is a list": lambda peer: {**peer.metadata, "config": "[1, 2]"},
    "config is a number": lambda peer: {**peer.metadata, "config": "3"},
    "config is deep": lambda peer: {**peer.metadata, "config": "[" * 100_000},
    "config of another class": lambda peer: config_of(peer, _class_name="QwenImageTransformer2DModel"),
    "two other classes": lambda peer: {**config_of(peer, _class_name="QwenImageTransformer2DModel"),
                                       "model_class": "NunchakuQwenImageTransformer2DModel"},
    "class of another config": lambda peer: {**peer.metadata, "model_class": "NunchakuQwenImageTransformer2DModel"},
    "config of no class": lambda peer: {**config_of(peer, _class_name="Nothing"), "model_class": "Nothing"},
    "more layers": lambda peer: config_of(peer, num_layers=2),
    "fewer layers": lambda peer: config_of(peer, num_layers=0),
    "a billion layers": lambda peer: config_of(peer, num_layers=10**9),
    "no whole number": lambda peer: config_of(peer, num_layers="many"),
    "other heads": lambda peer: config_of(peer, num_attention_heads=3),
    "negative heads": lambda peer: config_of(peer, num_attention_heads=-2),
    "our entry is no JSON": lambda peer: {**peer.metadata, "nunchaku_py": "{"},
    "our entry is a list": lambda peer: {**peer.metadata, "nunchaku_py": "[]"},
    "our entry has no sites": lambda peer: {**peer.metadata, "nunchaku_py": "{}"},
    "our entry has odd sites": lambda peer: {**peer.metadata, "nunchaku_py": '{"sites": {"a": 3}}'},
    "our entry has odd biases": lambda peer: {
        **peer.metadata, "nunchaku_py": json.dumps({"sites": {}, "biases": {f"{BLOCK}.attn.to_q": "float32:?"}})},
}


@pytest.mark.parametrize("kind", sorted(METADATA))
def test_metadata_is_missing_or_garbled(good: PeerFile, tmp_path: Path, kind: str) -> None:
    refused(good, tmp_path, "", lambda state: None, METADATA[kind](good))


@pytest.mark.parametrize("garbled", ["{", "[]", "3", "nonsense"])
def test_what_no_reading_needs_may_be_garbled(good: PeerFile, tmp_path: Path, garbled: str) -> None:
    """The tensors say what these say; what is written again is right, or is refused."""
    path = tmp_path / "odd.safetensors"
    save_file(good.tensors, path, metadata={**good.metadata, "quantization_config": garbled, "comfy_config": garbled})
    model = nq.load(path)
    try:
        nq.export(model, tmp_path / "again.safetensors", "nunchaku")
    except nq.NunchakuError:
        pass


@pytest.mark.parametrize(("name", "shape", "dtype"), [
    (f"{BLOCK}.norm1.linear.qweight", (191, 64), torch.int32), (f"{BLOCK}.norm1.linear.wscales", (3, 768), None),
    (f"{BLOCK}.norm1.linear.wzeros", (1, 768), None), (f"{JOINED}.qweight", (384, 63), torch.int8),
    (f"{JOINED}.wscales", (1, 384), None), (f"{JOINED}.smooth", (96,), None), (f"{JOINED}.bias", (383,), None)])
def test_sizes_are_odd(good: PeerFile, tmp_path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype | None
                       ) -> None:
    kind = dtype or good.tensors[name].dtype
    refused(good, tmp_path, name, lambda state: state.update({name: torch.zeros(shape).to(kind)}))
