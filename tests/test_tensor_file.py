"""Safetensors files read and written tensor by tensor: every refusal, every dtype, the library's own bytes; and
damaged files at random (fuzz_files.py)."""
from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.checkpoint import headers, tensor_file
from nunchaku_py.checkpoint.headers import read_header
from nunchaku_py.checkpoint.tensor_file import DTYPES, TensorFile, layout_of, write_tensors
from tests.checks import differences
from tests.fuzz_files import LOAD, check
from tests.fuzz_seeds import SEEDS

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file_of(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def every_dtype() -> dict[str, Tensor]:
    """Of each dtype a matrix, a scalar and a tensor without elements; the library writes no F8_E8M0."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (96,), dtype=torch.uint8, generator=generator)
    tensors: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        if name != "F8_E8M0":
            values = raw.view(dtype)[: 96 // dtype.itemsize]
            tensors |= {f"{name}.matrix": values.view(3, -1).clone(), f"{name}.scalar": values[0].clone(),
                        f"{name}.empty": values[:0].view(0, 5).clone()}
    return tensors


# ------------------------------------------------------------------------------------------------------------- headers
HEADERS: dict[str, tuple[Any, str]] = {
    "not an object": (b"[12]    ", "does not begin with '{'"),
    "not JSON": (b'{"a":   ', "cannot be understood"),
    "not UTF-8": (b'{"\xff": 1}', "cannot be understood"),
    "in UTF-16": ("{}".encode("utf-16"), "does not begin with"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "name twice": (b'{"a": 1, "a": 1}', "a stands there twice"),
    "field twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "dtype stands there twice"),
    "half a surrogate": (b'{"\\ud800": 1}', "cannot be understood"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", "cannot be understood|damaged"),
    "metadata of numbers": ({"__metadata__": {"k": 1}, "t": ENTRY}, "k in its __metadata__ is not a text"),
    "metadata a list": ({"__metadata__": [], "t": ENTRY}, "__metadata__ is not a table"),
    "metadata null": ({"__metadata__": None, "t": ENTRY}, "__metadata__ is not a table"),
    "entry a list": ({"t": []}, "t: damaged: its header is not a table"),
    "field missing": ({"t": {"dtype": "F32", "shape": [4]}}, "t: damaged: its header is not a table"),
    "field too many": ({"t": {**ENTRY, "x": 1}}, "t: damaged: its header is not a table"),
    "dtype a number": ({"t": {**ENTRY, "dtype": 3}}, "t: damaged: its header is not a table"),
    "shape a number": ({"t": {**ENTRY, "shape": 4}}, "t: damaged: its shape"),
    "shape negative": ({"t": {**ENTRY, "shape": [-2, -2]}}, "t: damaged: its shape"),
    "shape of floats": ({"t": {**ENTRY, "shape": [2.0, 2]}}, "t: damaged: its shape"),
    "shape of booleans": ({"t": {**ENTRY, "shape": [True, 4]}}, "t: damaged: its shape"),
    "shape too large": ({"t": {**ENTRY, "shape": [2**62, 4]}}, "more than 2\\^63 elements"),
    "shape empty but huge": ({"t": {**ENTRY, "shape": [2**62, 4, 0]}}, "more than 2\\^63 elements"),
    "65 axes": ({"t": {**ENTRY, "shape": [1] * 65}}, "t: damaged: its shape"),
    "shape of another size": ({"t": {**ENTRY, "shape": [3]}}, r"t: damaged: F32 \(3,\) takes 12 bytes, it has 16"),
    "dtype of another size": ({"t": {**ENTRY, "dtype": "F64"}}, r"F64 \(2, 2\) takes 32 bytes, it has 16"),
    "half a byte": ({"t": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, "takes 2 bytes, it has 1"),
    "offsets descending": ({"t": {**ENTRY, "data_offsets": [16, 0]}}, "t: damaged: its data_offsets"),
    "offsets negative": ({"t": {**ENTRY, "data_offsets": [-16, 0]}}, "t: damaged: its data_offsets"),
    "three offsets": ({"t": {**ENTRY, "data_offsets": [0, 8, 16]}}, "t: damaged: its data_offsets"),
    "offsets of floats": ({"t": {**ENTRY, "data_offsets": [0, 16.0]}}, "t: damaged: its data_offsets"),
    "beyond the end": ({"t": {**ENTRY, "data_offsets": [8, 24]}}, "promises 24 bytes of tensors, it has 16"),
    "overlap": ({"t": ENTRY, "u": {**ENTRY, "shape": [3], "data_offsets": [4, 16]}}, "shares bytes with"),
    "hole": ({"t": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}, "u": {**ENTRY, "shape": [2],
              "data_offsets": [8, 16]}}, "u: damaged: it leaves a hole after"),
    "hole at the front": ({"t": {**ENTRY, "shape": [2], "data_offsets": [8, 16]}}, "t: damaged: it leaves a hole"),
    "nothing but data": ({}, "promises 0 bytes of tensors, it has 16"),
    "awkward name": ({"a\nb" + "x" * 1000: {**ENTRY, "shape": 4}}, r"'a\\nbx+\.\.\.: damaged"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(tmp_path, case: str) -> None:
    header, sentence = HEADERS[case]
    with pytest.raises(NunchakuError, match=sentence) as caught:
        read_header(file_of(tmp_path / "some.safetensors", header))
    said = str(caught.value)
    assert "some.safetensors" in said and "\n" not in said and len(said) < 600


def test_files_that_cannot_hold_a_header(tmp_path) -> None:
    path = tmp_path / "some.safetensors"
    for data in (b"", b"1234567", struct.pack("<Q", 1), struct.pack("<Q", 2**64 - 1) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(NunchakuError, match="some.safetensors: not a safetensors file, or cut short"):
            read_header(path)
    for bad in (tmp_path, tmp_path / "absent", "a\0b"):
        with pytest.raises(NunchakuError, match="cannot be read"):
            read_header(bad)


def test_a_header_longer_than_the_library_allows(tmp_path, monkeypatch) -> None:
    path = file_of(tmp_path / "some.safetensors", {"t": ENTRY})
    monkeypatch.setattr(headers, "LONGEST", 20)
    with pytest.raises(NunchakuError, match="not a safetensors file"):
        read_header(path)
    with pytest.raises(NunchakuError, match="its header would have"):
        monkeypatch.setattr(tensor_file, "LONGEST", 20)
        write_tensors(path, {"t": ((2, 2), torch.float32)}, [], {})


def test_metadata_of_a_size_that_nobody_means(tmp_path, monkeypatch) -> None:
    path = file_of(tmp_path / "some.safetensors", {"__metadata__": {"k": "x" * 21}, "t": ENTRY})
    monkeypatch.setattr(headers, "METADATA", 20)
    monkeypatch.setattr(tensor_file, "METADATA", 20)
    with pytest.raises(NunchakuError, match="some.safetensors: k in its __metadata__ has 21 characters"):
        read_header(path)
    with pytest.raises(NunchakuError, match="k in its metadata has 21 characters"):
        write_tensors(path, {}, [], {"k": "x" * 21})


def test_a_dtype_of_later_days_is_listed_but_not_read(tmp_path) -> None:
    path = file_of(tmp_path / "some.safetensors", {"t": {**ENTRY, "dtype": "F3"}})
    assert read_header(path).tensors["t"].dtype == "F3"
    with TensorFile(path) as file, pytest.raises(NunchakuError, match="some.safetensors: t: dtype F3 is not one"):
        file.read("t")


def test_headers_are_read_without_torch() -> None:
    code = "import sys; import nunchaku_py.checkpoint.headers; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(nq.__file__).parents[1]).returncode == 0


# ------------------------------------------------------------------------------------------------------------- reading
def test_what_the_library_wrote_is_read(tmp_path) -> None:
    tensors, path = every_dtype(), tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"a": "1"})
    with TensorFile(path) as file:
        assert set(file.names()) == set(tensors) and "I8.matrix" in file and "x" not in file
        assert file.metadata == {"a": "1"} and file.path_of("I8.matrix") == path
        read = {name: file.read(name) for name in file.names()}
    assert differences(read, tensors) == []
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())


def test_shards_are_one_file(tmp_path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({"a": torch.ones(2)}, paths[0], metadata={"k": "first", "m": "1"})
    save_file({"b": torch.zeros(3)}, paths[1], metadata={"k": "second", "n": "2"})
    with TensorFile(paths) as file:
        assert file.names() == ["a", "b"] and file.metadata == {"k": "first", "m": "1", "n": "2"}
        assert file.read("b").tolist() == [0, 0, 0] and file.read("a").tolist() == [1, 1]
        with pytest.raises(NunchakuError, match="1.safetensors: holds no tensor c"):
            file.read("c")
    with pytest.raises(NunchakuError, match="1.safetensors: a: is also in .*1.safetensors"):
        TensorFile([paths[0], paths[0]])


def test_a_file_that_shrinks_while_it_is_read(tmp_path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(8)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 5)
        assert file.read("a").tolist() == [1, 1]
        with pytest.raises(NunchakuError, match="some.safetensors: b: cut short: 5 of its 32 bytes are missing"):
            file.read("b")


# ------------------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize("metadata", [{}, {"b": "ü\x01\x7f\"\\", "a": "{}"}])
def test_the_bytes_are_the_librarys(tmp_path, metadata: dict[str, str]) -> None:
    """But for the order of the metadata, which the library leaves to chance."""
    tensors, path, theirs = every_dtype(), tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensors["größe"] = torch.ones(3)
    save_file(tensors, theirs, metadata={key: metadata[key] for key in list(metadata)[:1]} or None)
    one = {key: metadata[key] for key in list(metadata)[:1]}
    write_tensors(path, layout_of(tensors), reversed(tensors.items()), one)
    assert path.read_bytes() == theirs.read_bytes()
    write_tensors(path, layout_of(tensors), tensors.items(), metadata)
    assert differences(load_file(path), tensors) == []
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    assert list(read_header(path).metadata) == sorted(metadata)


def test_tensors_that_lie_otherwise_are_written_in_a_row(tmp_path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    tensors = {"t": matrix.T, "s": matrix[:, ::2], "p": torch.nn.Parameter(matrix), "n": torch.ones(4).cfloat().conj()}
    write_tensors(tmp_path / "f.safetensors", layout_of(tensors), tensors.items(), {})
    read = load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("given", "sentence"), [
    ([("a", torch.ones(2))], "1 tensors never came, b among them"),
    ([("a", torch.ones(2)), ("a", torch.ones(2))], "a: came twice"),
    ([("c", torch.ones(2))], "c: was not announced"),
    ([("a", torch.ones(3))], r"a: announced as \(2,\) torch.float32, came as \(3,\)"),
    ([("a", torch.ones(2).half())], "a: announced as .*, came as .* torch.float16"),
])
def test_tensors_that_were_promised_otherwise(tmp_path, given: list, sentence: str) -> None:
    layout = {"a": ((2,), torch.float32), "b": ((0,), torch.int8)}
    with pytest.raises(NunchakuError, match=f"f.safetensors: {sentence}"):
        write_tensors(tmp_path / "f.safetensors", layout, given, {})


def test_a_dtype_that_no_file_holds(tmp_path) -> None:
    with pytest.raises(NunchakuError, match="f.safetensors: a: safetensors files hold no torch.complex128"):
        write_tensors(tmp_path / "f.safetensors", {"a": ((2,), torch.complex128)}, [], {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_the_os() -> None:
    with pytest.raises(OSError, match="No space left"):
        write_tensors("/dev/full", {"a": ((2,), torch.float32)}, [("a", torch.ones(2))], {})


def test_one_tensor_is_in_memory_at_a_time(tmp_path) -> None:
    """Eight of 64 MB, written and read again, in less memory than four of them."""
    code = f"""
import resource, torch
from nunchaku_py.checkpoint.tensor_file import TensorFile, write_tensors
names, shape, path = [str(i) for i in range(8)], (64, 2**20), {str(tmp_path / "f.safetensors")!r}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = peak()
write_tensors(path, {{n: (shape, torch.uint8) for n in names}},
              ((n, torch.full(shape, 7, dtype=torch.uint8)) for n in names), {{}})
with TensorFile(path) as file:
    assert all(file.read(name)[63, -1] == 7 for name in names)
assert peak() - start < 200 * 1024, peak() - start
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(nq.__file__).parents[1])
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("name", SEEDS)
def test_damaged_files_are_refused_or_make_sense(tmp_path, name: str) -> None:
    found = check(LOAD, SEEDS[name](tmp_path), 300, seed=1_000_000)
    assert found["refused"] > 100, found


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a million layers": ({"num_layers": 10**6}, "far more parts than the"),
    "a number of layers that is none": ({"num_layers": 10**12}, "num_layers is 1000000000000"),
    "a table of 100 GB": ({"sample_size": 40_000}, "a table of .* elements"),
    "layers in words": ({"num_layers": "two"}, "does not describe a PixArtTransformer2DModel"),
    "no model": ({"_class_name": "FluxPipeline"}, "model class 'FluxPipeline' is not one"),
    "no class": ({"_class_name": ["a"]}, "is not one that diffusers or transformers has"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_would_build_without_end(tmp_path, case: str) -> None:
    change, sentence = CONFIGS[case]
    good = SEEDS["ours"](tmp_path)
    with TensorFile(good) as file:
        config = json.dumps({**json.loads(file.metadata["config"]), **change})
        tensors = {name: file.read(name) for name in file.names()}
        write_tensors(tmp_path / "bad.safetensors", layout_of(tensors), tensors.items(),
                      {**file.metadata, "config": config})
    with pytest.raises(NunchakuError, match=f"bad.safetensors: .*{sentence}"):
        nq.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("shared", [{"a": "b"}, {"proj_out.bias": "proj_out.weight"}, {"x": 3}, [], "{"])
def test_shared_tensors_that_are_not_there(tmp_path, shared: Any) -> None:
    good = SEEDS["ours"](tmp_path)
    with TensorFile(good) as file:
        tensors = {name: file.read(name) for name in file.names()}
        write_tensors(tmp_path / "bad.safetensors", layout_of(tensors), tensors.items(),
                      {**file.metadata, "shared": shared if shared == "{" else json.dumps(shared)})
    with pytest.raises(NunchakuError, match="bad.safetensors: damaged: 'shared' in its metadata"):
        nq.load(tmp_path / "bad.safetensors")


def test_a_text_encoder_that_was_never_saved_names_its_class(tmp_path) -> None:
    """transformers notes the class in the config when it saves, and a single file is not saved by it."""
    assert type(nq.load(SEEDS["text"](tmp_path))).__name__ == "T5EncoderModel"
