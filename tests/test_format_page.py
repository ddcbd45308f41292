"""docs/format.md: its golden bytes, read as the page says with struct and arithmetic alone, and by this package."""
from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.checkpoint.manifest import Manifest
from nunchaku_py.checkpoint.tensor_file import TensorFile
from nunchaku_py.commands.stored_sites import LEAVES
from nunchaku_py.site import Site
from nunchaku_py.swap import fill_module, quantized_sites

PAGE = Path(__file__).parents[1] / "docs/format.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("## Golden bytes\n")[2]
CONFIG_TEXT, TENSORS_TEXT, MEANING_TEXT = re.findall(r"^```\w+\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
CONFIG = json.loads(CONFIG_TEXT)
LINE = re.compile(r"(\S+) +(\S+) +(\[[\d, ]+\]) +([0-9a-f ]+)")
Rows = list[list[float]]


def _tensors() -> dict[str, tuple[str, list[int], bytes]]:
    lines = (LINE.fullmatch(line).groups() for line in TENSORS_TEXT.splitlines())
    return {name: (dtype, json.loads(shape), bytes.fromhex(raw)) for name, dtype, shape, raw in lines}


def _meaning() -> dict[str, Rows]:
    """"a w" → rows."""
    return {line[:3]: json.loads(f"[{line[3:].strip().replace(']  [', '], [')}]") for line in MEANING_TEXT.splitlines()}


TENSORS, MEANING = _tensors(), _meaning()
SIZES = {"a": (2, 5), "b": (1, 18), "c": (1, 4), "d": (1, 5)}


# ------------------------------------------------------------------------------------- the page, without this package
def _numbers(name: str) -> list[float]:
    dtype, _, raw = TENSORS[name]
    if dtype == "F8_E4M3":
        return [_e4m3(byte) for byte in raw]
    if dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[i:i + 2] for i in range(0, len(raw), 2))
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def _e4m3(byte: int) -> float:
    e, m = byte >> 3 & 15, byte & 7
    size = (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
    return -size if byte & 128 else size


def _rows(name: str) -> Rows:
    numbers, columns = _numbers(name), TENSORS[name][1][-1]
    return [numbers[i:i + columns] for i in range(0, len(numbers), columns)]


def _value(code: int, fmt: str) -> float:
    if fmt == "nvfp4":
        return (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7] * (-1.0 if code & 8 else 1.0)
    return code - 16 if fmt == "int4" and code > 7 else code


def _decoded(prefix: str, entry: dict[str, Any], k: int) -> Rows:
    """w, by the page's table of formats."""
    codes, (n, width) = TENSORS[f"{prefix}.codes"][2], TENSORS[f"{prefix}.codes"][1]
    scales, rows = _rows(f"{prefix}.scales"), []
    for row in range(n):
        nibbles = [codes[row * width + i // 2] >> 4 * (i % 2) & 15 for i in range(k)]
        w = [_value(code, entry["format"]) * scales[row][i // entry["group"]] for i, code in enumerate(nibbles)]
        if entry["format"] == "uint4":
            zeros = _rows(f"{prefix}.zeros")[row]
            w = [value + zeros[i // entry["group"]] for i, value in enumerate(w)]
        if entry["format"] == "nvfp4":
            w = [value * _numbers(f"{prefix}.channel_scale")[row] for value in w]
        rows.append(w)
    return rows


def _parts(name: str) -> Iterable[tuple[str, dict[str, Any], int, int]]:
    """(prefix of the tensors, entry, range of k)."""
    entry = CONFIG["sites"][name]
    for i, part in enumerate(entry.get("parts", ())):
        yield f"{name}.parts.{i}", part, *part["k_range"]
    if "parts" not in entry:
        yield name, entry, 0, SIZES[name][1]


def _whole(name: str, with_smooth: bool) -> Rows:
    out: Rows = [[] for _ in range(SIZES[name][0])]
    for prefix, entry, first, last in _parts(name):
        smooth = _numbers(f"{prefix}.smooth") if with_smooth else [1.0] * (last - first)
        for n, row in enumerate(_decoded(prefix, entry, last - first)):
            w = [value / by for value, by in zip(row, smooth, strict=True)]
            if with_smooth and entry.get("rank"):
                up, down = _rows(f"{prefix}.up"), _rows(f"{prefix}.down")
                w = [value + sum(up[n][r] * down[r][k] for r in range(entry["rank"])) for k, value in enumerate(w)]
            out[n] += w
    return out


def _output(name: str) -> list[float]:
    """y by the page's formula for kind w4a4, shift and all, without Q."""
    y, x = _numbers(f"{name}.bias"), MEANING[f"{name} x"][0]
    for prefix, entry, first, last in _parts(name):
        smooth, mine = _numbers(f"{prefix}.smooth"), x[first:last]
        moved = [(value + entry.get("shift", 0)) / by for value, by in zip(mine, smooth, strict=True)]
        down = _rows(f"{prefix}.down") if entry.get("rank") else []
        h = [sum(map(math.prod, zip(row, mine, strict=True))) for row in down]
        for n, row in enumerate(_decoded(prefix, entry, last - first)):
            y[n] += sum(map(math.prod, zip(row, moved, strict=True)))
            y[n] += sum(map(math.prod, zip(_rows(f"{prefix}.up")[n], h, strict=True))) if h else 0.0
    return y


@pytest.mark.parametrize("name", SIZES)
def test_what_the_bytes_stand_for(name):
    assert _whole(name, with_smooth=False) == MEANING[f"{name} w"]
    if f"{name} y" in MEANING:
        assert _whole(name, with_smooth=True) == MEANING[f"{name} W"]
        assert _output(name) == MEANING[f"{name} y"][0]


def test_a_shifted_bias_lacks_what_the_shift_adds():
    prefix, entry, first, last = list(_parts("d"))[1]
    smooth = _numbers(f"{prefix}.smooth")
    total = sum(w / by for w, by in zip(_decoded(prefix, entry, last - first)[0], smooth, strict=True))
    assert [_numbers("d.bias")[0] + entry["shift"] * total] == MEANING["d b"][0]


def test_every_tensor_of_the_page_has_the_bytes_that_its_shape_takes():
    sizes = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
    assert all(len(raw) == sizes[dtype] * math.prod(shape) for dtype, shape, raw in TENSORS.values())


def test_the_table_of_e2m1():
    codes, values = (re.search(rf"^\| {name} \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]
                     for name in ("e2m1 code", "value"))
    stated = [float(value.replace("−", "-")) for value in values.split("|")]
    assert stated == [_value(int(code), "nvfp4") for code in codes.split("|")]


# ---------------------------------------------------------------------------------------------- and with this package
def _file(path: Path) -> Path:
    """A safetensors file as the page describes it, by hand."""
    table: dict[str, Any] = {"__metadata__": {"config": json.dumps({"quantization_config": CONFIG})}}
    data = b""
    for name, (dtype, shape, raw) in TENSORS.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (n, k) in SIZES.items():
            setattr(self, name, nn.Linear(k, n, bias=f"{name}.bias" in TENSORS))


@pytest.fixture
def model(tmp_path) -> nn.Module:
    """The linears of the page, in this package's modules."""
    with TensorFile(_file(tmp_path / "golden.safetensors")) as file:
        state = {name: file.read(name) for name in file.names()}
        config = json.loads(file.metadata["config"])["quantization_config"]
    model = Model()
    Manifest.from_json(config).install(model, state, "the page")
    for name in SIZES:
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        fill_module(getattr(model, name), own, name)
    return model


def test_the_page_names_what_this_package_reads():
    named = set(re.findall(r"^\| `(?:P\.)?(\w+)`(?:, `P\.(\w+)`)?", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for names in named for name in names}
    assert {field.name for field in fields(Site)} | set(LEAVES) | set(Manifest().to_json()) <= named


def test_this_package_decodes_the_same(model):
    for name in SIZES:
        module = getattr(model, name)
        w = torch.cat([site.qtensor().dequantize() for site in quantized_sites(module)], 1)
        assert torch.equal(w, torch.tensor(MEANING[f"{name} w"]))


def test_this_package_computes_the_same(model):
    nq.set_mode(model, "a16")
    for name in ("a", "d"):
        module, x = getattr(model, name), torch.tensor(MEANING[f"{name} x"])
        assert torch.equal(module(x), torch.tensor(MEANING[f"{name} y"]))
        weight = torch.cat([site.effective_weight() for site in quantized_sites(module)], 1)
        assert torch.equal(weight, torch.tensor(MEANING[f"{name} W"]))
    assert model.d.dense().bias.tolist() == MEANING["d b"][0]


def test_this_package_writes_the_same_bytes(model):
    state = model.state_dict()
    assert set(state) == set(TENSORS)
    for name, (_, shape, raw) in TENSORS.items():
        assert list(state[name].shape) == shape
        assert state[name].contiguous().view(torch.uint8).numpy().tobytes() == raw
