"""Files that are damaged, that contradict themselves or are not ours: refused in a sentence that names them."""
from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nunchaku_py as nq
from tests.tiny import MODELS

WEIGHTS = "diffusion_pytorch_model.safetensors"
SITE = "transformer_blocks.0.attn1.to_q"
FORMS = ["folder", "single file"]
State = dict[str, Tensor]


def pixart() -> nn.Module:
    return MODELS["pixart"]()[0]


def weights_of(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def damaged(saved: dict[str, Path], form: str, to: Path, change: Callable[[bytearray], Any]) -> Path:
    """A copy of the checkpoint whose weights file went through `change`."""
    path = to / saved[form].name
    source = weights_of(saved[form])
    data = bytearray(source.read_bytes())
    changed = change(data)
    if form == "folder":
        path.mkdir()
        (path / "config.json").write_bytes((saved[form] / "config.json").read_bytes())
    weights_of(path).write_bytes(data if changed is None else changed)
    return path


def rewritten(saved: dict[str, Path], form: str, to: Path, change: Callable[[State], Any]) -> Path:
    """A copy whose tensors went through `change`: a well-formed file that says something wrong."""
    path = to / saved[form].name
    with safe_open(weights_of(saved[form]), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights_of(saved[form]))
    change(tensors)
    if form == "folder":
        path.mkdir()
        (path / "config.json").write_bytes((saved[form] / "config.json").read_bytes())
    save_file(tensors, weights_of(path), metadata=metadata)
    return path


def reconfigured(saved: dict[str, Path], form: str, to: Path, change: Callable[[dict], Any]) -> Path:
    """A copy whose quantization_config went through `change`."""
    path = to / saved[form].name
    with safe_open(weights_of(saved[form]), framework="pt") as file:
        metadata = file.metadata()
    text = metadata["config"] if form == "single file" else (saved[form] / "config.json").read_text()
    config = json.loads(text)
    change(config["quantization_config"])
    if form == "folder":
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
    else:
        metadata["config"] = json.dumps(config)
    save_file(load_file(weights_of(saved[form])), weights_of(path), metadata=metadata)
    return path


def refused(path: Path, *words: str) -> None:
    """nq.load refuses with a sentence that names the file and these words; from_pretrained refuses too."""
    with pytest.raises(nq.NunchakuError) as caught:
        nq.load(path)
    text = str(caught.value)
    assert path.stem in text and all(word in text for word in words), text
    assert len(text) < 600 and "\n" not in text.strip(), text
    if path.is_dir():
        from diffusers import PixArtTransformer2DModel

        with pytest.raises((ValueError, OSError)):
            PixArtTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------------ damaged files
def _header(data: bytearray) -> int:
    return struct.unpack("<Q", data[:8])[0]


def _length_lies(data: bytearray, by: int) -> None:
    data[:8] = struct.pack("<Q", _header(data) + by)


DAMAGES: dict[str, Callable[[bytearray], Any]] = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:5],
    "cut in the header": lambda data: data[:500],
    "cut in the tensors": lambda data: data[:-100],
    "cut by one byte": lambda data: data[:-1],
    "longer than it says": lambda data: data + b"\0" * 64,
    "header shorter than it is": lambda data: _length_lies(data, -8),
    "header longer than it is": lambda data: _length_lies(data, 8),
    "header of 2^60 bytes": lambda data: data.__setitem__(slice(0, 8), struct.pack("<Q", 2**60)),
    "header not JSON": lambda data: data.__setitem__(8, 0xFF),
    "not safetensors": lambda data: b"PK\3\4" + bytes(1000),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(saved, tmp_path, form: str, damage: str) -> None:
    refused(damaged(saved, form, tmp_path, DAMAGES[damage]), "safetensors")


def test_flipped_bits_in_the_header(saved, tmp_path) -> None:
    """One byte of the header at a time: refused with a sentence, or the flip changed nothing that matters."""
    good = nq.load(saved["single file"]).state_dict()
    data = saved["single file"].read_bytes()
    generator = torch.Generator().manual_seed(0)
    silent = 0
    for place in torch.randint(8, 8 + _header(bytearray(data)), (40,), generator=generator).tolist():
        path = tmp_path / "flipped.safetensors"
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 7)
        path.write_bytes(changed)
        try:
            loaded = nq.load(path).state_dict()
        except nq.NunchakuError as error:
            assert "flipped" in str(error), f"byte {place}: {error}"
        else:
            silent += 1
            assert set(loaded) == set(good), f"byte {place}"
            assert all(loaded[name].shape == good[name].shape for name in good), f"byte {place}"
    assert silent < 20


# ----------------------------------------------------------------------------------------------------- wrong tensors
def _drop(name: str) -> Callable[[State], Any]:
    return lambda state: state.pop(name)


def _put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[State], Any]:
    return lambda state: state.__setitem__(name, make(state[name]).contiguous())


def _poison(value: float) -> Callable[[Tensor], Tensor]:
    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[1] = value
        return tensor

    return poison


CHANGES: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "codes missing": (_drop(f"{SITE}.codes"), (f"{SITE}.codes", "missing")),
    "bias missing": (_drop(f"{SITE}.bias"), (f"{SITE}.bias", "missing")),
    "16-bit tensor missing": (_drop("proj_out.weight"), ("proj_out.weight", "missing")),
    "unexpected": (lambda state: state.__setitem__(f"{SITE}.zeros", torch.zeros(3)), (f"{SITE}.zeros", "unexpected")),
    "unexpected weight": (lambda state: state.__setitem__(f"{SITE}.weight", torch.zeros(3)),
                          (f"{SITE}.weight", "unexpected")),
    "codes unpacked": (_put(f"{SITE}.codes", lambda t: t.repeat(1, 2)), (f"{SITE}.codes", "(128, 64)", "(128, 128)")),
    "codes of another type": (_put(f"{SITE}.codes", lambda t: t.view(torch.int8)), (f"{SITE}.codes", "int8")),
    "scales of another type": (_put(f"{SITE}.scales", lambda t: t.float()), (f"{SITE}.scales", "float32")),
    "scales transposed": (_put(f"{SITE}.scales", lambda t: t.T), (f"{SITE}.scales", "(2, 128)")),
    "branch of another rank": (_put(f"{SITE}.down", lambda t: t[:3]), (f"{SITE}.down", "(3, 128)")),
    "16-bit tensor of another shape": (_put("proj_out.weight", lambda t: t[:3]), ("proj_out.weight", "3, 128")),
    "NaN in scales": (_put(f"{SITE}.scales", _poison(float("nan"))), (f"{SITE}.scales", "NaN")),
    "infinity in scales": (_put(f"{SITE}.scales", _poison(float("inf"))), (f"{SITE}.scales", "infinite")),
    "NaN in the branch": (_put(f"{SITE}.up", _poison(float("nan"))), (f"{SITE}.up", "NaN")),
    "zero in smooth": (_put(f"{SITE}.smooth", _poison(0.0)), (f"{SITE}.smooth", "positive")),
    "negative smooth": (_put(f"{SITE}.smooth", _poison(-1.0)), (f"{SITE}.smooth", "positive")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_wrong_tensor(saved, tmp_path, form: str, change: str) -> None:
    how, words = CHANGES[change]
    refused(rewritten(saved, form, tmp_path, how), *words)


# ------------------------------------------------------------------------------------------------------ wrong config
def _site(**fields: Any) -> Callable[[dict], Any]:
    return lambda config: config["sites"][SITE].update(fields)


CONFIGS: dict[str, tuple[Callable[[dict], Any], tuple[str, ...]]] = {
    "later version": (lambda c: c.update(format_version=2), ("format_version", "2")),
    "no version": (lambda c: c.pop("format_version"), ("format_version",)),
    "version as text": (lambda c: c.update(format_version="1"), ("format_version",)),
    "unknown dtype": (lambda c: c.update(compute_dtype="float8"), ("compute_dtype", "float8")),
    "no sites": (lambda c: c.update(sites={}), ("sites",)),
    "sites as list": (lambda c: c.update(sites=[SITE]), ("sites",)),
    "site that is not there": (lambda c: c["sites"].update({"blocks.9.fc": c["sites"][SITE]}), ("blocks.9.fc",)),
    "unknown kind": (_site(kind="w2a2"), ("w2a2",)),
    "unknown format": (_site(format="int3"), ("int3",)),
    "unknown field": (_site(rotation=1), ("rotation",)),
    "negative group": (_site(group=-64), ("group",)),
    "group as text": (_site(group="64"), ("group",)),
    "rank as text": (_site(rank="8"), ("rank",)),
    "entry as text": (lambda c: c["sites"].update({SITE: "w4a4"}), ()),
    "parts with a gap": (lambda c: c["sites"].update(
        {SITE: {"parts": [{"k_range": [0, 64], "kind": "w4a4", "format": "int4", "group": 64},
                          {"k_range": [80, 128], "kind": "w4a4", "format": "int4", "group": 64}]}}), ("k_range",)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CONFIGS)
def test_wrong_config(saved, tmp_path, form: str, change: str) -> None:
    how, words = CONFIGS[change]
    refused(reconfigured(saved, form, tmp_path, how), *words)


def test_another_group_than_the_scales_have(saved, tmp_path) -> None:
    refused(reconfigured(saved, "folder", tmp_path, _site(group=32)), f"{SITE}.scales", "(128, 4)", "(128, 2)")


# ------------------------------------------------------------------------------------------------- not a file of ours
def test_path_that_does_not_exist(tmp_path) -> None:
    with pytest.raises(nq.NunchakuError, match="nowhere"):
        nq.load(tmp_path / "nowhere")


@pytest.mark.parametrize("make", ["empty folder", "16-bit folder", "16-bit file", "config not JSON", "unknown class"])
def test_not_ours(tmp_path, saved, make: str) -> None:
    path = tmp_path / "thing"
    path.mkdir()
    if make == "16-bit folder":
        pixart().save_pretrained(path)
    elif make == "16-bit file":
        path = path / "thing.safetensors"
        save_file(pixart().state_dict(), path)
    elif make != "empty folder":
        config = json.loads((saved["folder"] / "config.json").read_text())
        text = json.dumps({**config, "_class_name": "NoSuchModel"}) if make == "unknown class" else "{"
        (path / "config.json").write_text(text)
        (path / WEIGHTS).write_bytes((saved["folder"] / WEIGHTS).read_bytes())
    with pytest.raises(nq.NunchakuError, match="thing"):
        nq.load(path)


@pytest.mark.parametrize("path", ["config.json", "notes.txt"])
def test_file_that_is_no_model(tmp_path, path: str) -> None:
    (tmp_path / path).write_text("{}")
    with pytest.raises(nq.NunchakuError, match=path):
        nq.load(tmp_path / path)
