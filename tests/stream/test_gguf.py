"""GGUF files: blocks against their description, models by way of diffusers' converters, damages."""
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.stream.gguf import GGUFFile
from nunchaku_py.stream.gguf_blocks import KINDS
from nunchaku_py.stream.sources import open_source
from tests.stream import makers
from tests.stream.gguf_files import BF16, F16, F32, FP16, MEANING, Q4_0, Q8_0, Entry, plain, q8_0, write
from tests.stream.test_single_file import config_folder, whole_flux
from tests.tiny import MODELS

BY_NAME = {kind.name: (number, kind) for number, kind in KINDS.items()}


def blocks(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """Random blocks whose fp16 numbers are below 2."""
    data = torch.randint(0, 256, (count, BY_NAME[name][1].nbytes), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))
    for place in FP16[name]:
        data[:, place + 1] &= 0xBF
    return data


@pytest.mark.parametrize("name", BY_NAME)
def test_blocks_mean_what_their_description_says(name: str) -> None:
    kind, data = BY_NAME[name][1], blocks(name, 9)
    found = kind.read(data)
    assert found.shape == (9, kind.values) and found.dtype == torch.float32
    wanted = torch.tensor([[MEANING[name](bytes(row.tolist()), i) for i in range(kind.values)] for row in data],
                          dtype=torch.float64)
    assert torch.equal(found, wanted.float())  # fp32 holds the products, and rounds the difference once


@pytest.mark.parametrize("name", BY_NAME)
def test_quantized_tensors(name: str, tmp_path: Path) -> None:
    number, kind = BY_NAME[name]
    data = blocks(name, 10)
    entry = Entry((5, 2 * kind.values), number, data.numpy().tobytes())
    path = write(tmp_path / "m.gguf", {"before": plain(torch.ones(3)), "a": entry}, alignment=64)
    file = GGUFFile(path)
    wanted = kind.read(data).bfloat16().reshape(5, -1)
    assert file.tensors["a"].dtype == "BF16" and file.tensors["a"].nbytes == wanted.nbytes
    assert torch.equal(file.read("a"), wanted) and torch.equal(file.read("a", (1, 4)), wanted[1:4])
    file.close()


def test_tensors_of_more_values_than_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nunchaku_py.stream.gguf._AT_ONCE", 512)
    number, kind = BY_NAME["Q4_K"]
    data = blocks("Q4_K", 15)
    file = GGUFFile(write(tmp_path / "m.gguf", {"a": Entry((5, 768), number, data.numpy().tobytes())}))
    assert torch.equal(file.read("a"), kind.read(data).bfloat16().reshape(5, 768))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_that_are_not_quantized(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 6).to(dtype), "b": torch.randn(5).to(dtype), "c": torch.randn(()).to(dtype)}
    file = GGUFFile(write(tmp_path / "m.gguf", {name: plain(tensor) for name, tensor in tensors.items()}, version=2))
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor) and file.tensors[name].shape == tuple(tensor.shape)
    for name in ("a", "b"):
        assert torch.equal(file.read(name, (1, 3)), tensors[name][1:3])


def test_metadata_of_every_type(tmp_path: Path) -> None:
    said = {"a": "text", "b": 3, "c": 0.5, "d": True, "e": [1, -2], "f": ["x", "yy"]}
    assert GGUFFile(write(tmp_path / "m.gguf", {"t": plain(torch.ones(2))}, said)).metadata == said


def test_a_shape_in_the_metadata(tmp_path: Path) -> None:
    tensor = torch.arange(64.0).reshape(2, 32)
    path = write(tmp_path / "m.gguf", {"a": plain(tensor)}, {"comfy.gguf.orig_shape.a": [4, 2, 8]})
    file = GGUFFile(path)
    assert file.tensors["a"].shape == (4, 2, 8) and torch.equal(file.read("a"), tensor.reshape(4, 2, 8))
    assert torch.equal(file.read("a", (1, 3)), tensor.reshape(4, 2, 8)[1:3])


def test_a_model_with_its_makers_names(tmp_path: Path) -> None:
    model, _ = MODELS["sd3"]()
    entries, meant = {}, {}
    for name, tensor in makers.sd3(dict(model.state_dict())).items():
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            entries[name], meant[name] = q8_0(tensor)
        else:
            entries[name], meant[name] = plain(tensor.half()), tensor.half()
    path = write(tmp_path / "m.gguf", entries)
    config, weights = open_source(path, config_folder(tmp_path / "config", model))
    assert config["_class_name"] == "SD3Transformer2DModel" and set(weights.tensors) == set(model.state_dict())
    q, k, v = meant["joint_blocks.1.context_block.attn.qkv.weight"].chunk(3)
    assert torch.equal(weights.read("transformer_blocks.1.attn.add_k_proj.weight"), k)
    shift, scale = meant["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(weights.read("norm_out.linear.weight"), torch.cat([scale, shift]))
    assert torch.equal(weights.read("pos_embed.pos_embed"), meant["pos_embed"])
    weights.close()


def test_the_config_of_flux_is_found(tmp_path: Path) -> None:
    own, entries = whole_flux(num_layers=1, num_single_layers=1), {}
    for name, tensor in makers.flux(own).items():
        small = tensor.ndim < 2 or tensor.shape[1] % 32
        entries[name] = Entry(tuple(tensor.shape), F16 if small else Q4_0,
                              2 * tensor.numel() if small else tensor.numel() // 32 * 18)
    entries["single_blocks.0.linear1.bias"] = plain(torch.arange(21504).float())
    config, weights = open_source(write(tmp_path / "flux.gguf", entries))
    assert config["num_layers"] == 1 and config["guidance_embeds"] and set(weights.tensors) == set(own)
    assert torch.equal(weights.read("single_transformer_blocks.0.attn.to_v.bias"), torch.arange(6144, 9216).float())
    assert weights.read("single_transformer_blocks.0.attn.to_v.weight").shape == (3072, 3072)


# ------------------------------------------------------------------------------------------------------------- damages
GOOD = {"a": plain(torch.ones(4, 8)), "b": plain(torch.ones(8))}


@pytest.mark.parametrize(("entries", "more", "said"), [
    (GOOD, {"version": 1}, "GGUF version 1, this release reads 2 and 3"),
    (GOOD, {"version": 0x03000000}, "little endian"),
    (GOOD, {"places": {"b": 32}}, "b: damaged: it shares bytes with a"),
    ({"a": Entry((4, 8), F32, b"")}, {}, "a: cut short or damaged: it ends at byte"),
    ({"a": Entry((4, 33), Q8_0, 200)}, {}, r"Q8_0 has blocks of 32, and it the shape \(4, 33\)"),
    ({"a": Entry((), Q8_0, 200)}, {}, "Q8_0 has blocks of 32"),
    ({"a": Entry((2**40, 2**40), BF16, 8)}, {}, "cut short or damaged: it ends at byte"),
    ({"a": Entry((4, 32), 19, 200)}, {}, "a: is of GGML's type 19, which is none of F32, F16, BF16, Q4_0"),
    ({"a": Entry((1,) * 9, F32, 4)}, {}, "damaged: it has 9 axes"),
    (GOOD, {"metadata": {"general.alignment": 0}}, "its alignment is 0"),
    (GOOD, {"metadata": {"general.alignment": "x"}}, "its alignment is x"),
    (GOOD, {"metadata": {"comfy.gguf.orig_shape.a": [5, 5]}}, r"it has 32 values, and its metadata the shape \[5, 5\]"),
    (GOOD, {"metadata": {"comfy.gguf.orig_shape.a": [-4, -8]}}, "and its metadata the shape"),
])
def test_damages_are_said(entries: dict[str, Entry], more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(NunchakuError, match=said):
        GGUFFile(write(tmp_path / "m.gguf", entries, **more))


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", GOOD, {"k": "text", "n": [1, 2], "s": ["x"]}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(NunchakuError, match="cut short"):
            GGUFFile(tmp_path / "cut.gguf")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": plain(torch.ones(8)), "b": plain(torch.ones(9999))})  # more than a buffer
    file = GGUFFile(path)
    with open(path, "r+b") as cut:
        cut.truncate(path.stat().st_size - 40)
    with pytest.raises(NunchakuError, match="b: cut short"):
        file.read("b")


@pytest.mark.parametrize(("head", "said"), [
    (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**40) + bytes(99), "a text in its header has"),
    (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QI", 0, 99) + bytes(99), "a value of the unknown type 99"),
    (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QIIQ", 0, 9, 4, 2**40) + bytes(99), "a list in its header has"),
    (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QIIQ", 0, 9, 4, 90) + bytes(99), "cut short"),
    (struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QIIQ", 0, 9, 9, 2) + bytes(99), "unknown type 9"),
    (struct.pack("<IQQ", 3, 2**60, 0) + bytes(99), "stands there twice|cut short|damaged"),
    (struct.pack("<IQQ", 3, 0, 2**60) + bytes(99), "cut short|unknown type|damaged"),
])
def test_headers_that_are_not_believed(head: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + head)
    with pytest.raises(NunchakuError, match=said):
        GGUFFile(tmp_path / "m.gguf")


def test_a_name_twice(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "m.gguf", {"a": GOOD["b"], "b": GOOD["b"]}).read_bytes())
    place = data.index(struct.pack("<Q", 1) + b"b")
    data[place + 8:place + 9] = b"a"
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(NunchakuError, match="a stands there twice"):
        GGUFFile(tmp_path / "m.gguf")


def test_files_with_bytes_changed_at_random(tmp_path: Path) -> None:
    """They are refused in a sentence, or all that they promise can be read."""
    whole = write(tmp_path / "m.gguf", GOOD | {"q": Entry((2, 32), Q8_0, bytes(68))}, {"k": "text", "n": [1, 2]})
    data, path = whole.read_bytes(), tmp_path / "changed.gguf"
    random, refused = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        changed = bytearray(data)
        for place, byte in torch.randint(0, 240, (2, 2), generator=random).tolist():
            changed[4 + place] = byte
        path.write_bytes(changed)
        try:
            file = GGUFFile(path)
        except NunchakuError:
            refused += 1
            continue
        for name, header in file.tensors.items():
            assert file.read(name).shape == header.shape
        file.close()
    assert 100 < refused < 400
