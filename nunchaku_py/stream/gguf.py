"""GGUF files, read tensor by tensor: their 16- and 32-bit tensors as they are, quantized ones as bfloat16.

A file is "GGUF", version, counts of tensors and of metadata, the metadata, what the tensors are, and, aligned, their
bytes, all little endian. Nothing of it is believed: counts, sizes and places must fit the file."""
from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..checkpoint.headers import TensorHeader, shown
from ..checkpoint.tensor_file import DTYPES
from ..errors import NunchakuError
from .gguf_blocks import KINDS, Kind
from .single_file import opened
from .weights import Weights

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST_AXES, _LONGEST_NAME, _LONGEST_TEXT = 8, 2**16, 2**26
_SHAPE = "comfy.gguf.orig_shape."  # metadata: the shape of a tensor that was stored with another
_AT_ONCE = 2**18  # values that are decoded at a time, so that what lies between stays in the cache


class Stored(NamedTuple):
    """A tensor as it lies in the file, rows last in memory order: (…, K)."""

    shape: tuple[int, ...]
    kind: str | Kind
    start: int

    @property
    def nbytes(self) -> int:
        count = math.prod(self.shape)
        return count // self.kind.values * self.kind.nbytes if isinstance(self.kind, Kind) else (
            count * DTYPES[self.kind].itemsize)


def is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError as error:
        raise NunchakuError(f"{path}: cannot be read: {error}") from error


def open_gguf(path: Path, config: Path | None = None) -> tuple[dict[str, Any], Weights]:
    """(config, weights), as of a safetensors file with the same names."""
    return opened(GGUFFile(path), config)


class GGUFFile:
    """The tensors of a file, by its own names."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._file = open(path, "rb")
        try:
            self.metadata, self._stored = _read_head(self._file, self.label)
            self._shapes = {name: self._shape(name, stored.shape) for name, stored in self._stored.items()}
        except BaseException:
            self._file.close()
            raise
        self.tensors: Mapping[str, TensorHeader] = {
            name: _header(self._shapes[name], stored) for name, stored in self._stored.items()}

    def _shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        shape = self.metadata.get(_SHAPE + name)
        if shape is None:
            return stored
        if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape) or (
                math.prod(shape) != math.prod(stored)):
            raise NunchakuError(f"{self.label}: {shown(name)}: damaged: it has {math.prod(stored)} values, "
                                f"and its metadata the shape {shape}")
        return tuple(shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        stored = self._stored[name]
        shape = self._shapes[name]
        if shape != stored.shape or len(shape) < 2:  # whose rows are none of the file's
            whole = self._values(name, stored, math.prod(stored.shape), stored.start).reshape(shape)
            return whole if rows is None else whole[rows[0]:rows[1]].clone()
        first, last = rows or (0, shape[0])
        before = first * (stored.nbytes // shape[0]) if shape[0] else 0
        count = (last - first) * math.prod(shape[1:])
        return self._values(name, stored, count, stored.start + before).reshape(last - first, *shape[1:])

    def _values(self, name: str, stored: Stored, count: int, start: int) -> torch.Tensor:
        self._file.seek(start)
        if not isinstance(stored.kind, Kind):
            values = torch.empty(count, dtype=DTYPES[stored.kind])
            self._fill(name, values.view(torch.uint8))
            return values
        values = torch.empty(count, dtype=torch.bfloat16)
        for part in values.split(_AT_ONCE):
            blocks = torch.empty(part.numel() // stored.kind.values, stored.kind.nbytes, dtype=torch.uint8)
            self._fill(name, blocks)
            part.copy_(stored.kind.read(blocks).flatten())
        return values

    def _fill(self, name: str, memory: torch.Tensor) -> None:
        view = memoryview(memory.flatten().numpy())
        if self._file.readinto(view) != len(view):
            raise NunchakuError(f"{self.label}: {shown(name)}: cut short")

    def close(self) -> None:
        self._file.close()


def _header(shape: tuple[int, ...], stored: Stored) -> TensorHeader:
    dtype = "BF16" if isinstance(stored.kind, Kind) else stored.kind
    return TensorHeader(dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize, stored.start)


# ------------------------------------------------------------------------------------------------------------- parsing
class _Reader:
    """Numbers and texts one after the other, none beyond the end of the file."""

    def __init__(self, file: IO[bytes], label: str) -> None:
        self.file, self.label = file, label
        self.size = file.seek(0, 2)
        file.seek(0)

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise NunchakuError(f"{self.label}: cut short or damaged within its header")
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise NunchakuError(f"{self.label}: damaged: a text in its header has {length} bytes")
        return self.bytes(length).decode("utf-8", errors="replace")

    def value(self) -> Any:
        """Of metadata. Lists of lists are not written by anyone."""
        kind = self.number("I")
        if kind != _LIST:
            return self._one(kind)
        kind, count = self.number("I"), self.number("Q")
        if count > self.size:  # each takes a byte at least
            raise NunchakuError(f"{self.label}: damaged: a list in its header has {count} values")
        if kind in _NUMBERS:
            form = _NUMBERS[kind]
            return [value for value, in struct.iter_unpack(f"<{form}", self.bytes(count * struct.calcsize(form)))]
        return [self._one(kind) for _ in range(count)]

    def _one(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text(_LONGEST_TEXT)
        if kind not in _NUMBERS:
            raise NunchakuError(f"{self.label}: damaged: its metadata has a value of the unknown type {kind}")
        return self.number(_NUMBERS[kind])


def _read_head(file: IO[bytes], label: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    reader = _Reader(file, label)
    if reader.size < 24 or reader.bytes(4) != MAGIC:
        raise NunchakuError(f"{label}: not a GGUF file, or cut short within its header")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise NunchakuError(f"{label}: GGUF version {version}, this release reads {' and '.join(map(str, _VERSIONS))}, "
                            "little endian")
    tensors, count = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(min(count, reader.size)):
        key = reader.text(_LONGEST_NAME)
        metadata[key] = reader.value()
    found: dict[str, Stored] = {}
    for _ in range(min(tensors, reader.size)):
        name, stored = _stored(reader)
        if name in found:
            raise NunchakuError(f"{label}: {shown(name)} stands there twice")
        found[name] = stored
    return metadata, _placed(found, reader, metadata.get("general.alignment", 32))


def _stored(reader: _Reader) -> tuple[str, Stored]:
    """Its start still counted from that of the data."""
    name = reader.text(_LONGEST_NAME)
    label = f"{reader.label}: {shown(name)}"
    axes = reader.number("I")
    if axes > _MOST_AXES:
        raise NunchakuError(f"{label}: damaged: it has {axes} axes")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    number, start = reader.number("I"), reader.number("Q")
    kind = _PLAIN.get(number) or KINDS.get(number)
    if kind is None:
        known = ", ".join([*("F32 F16 BF16".split()), *(kind.name for kind in KINDS.values())])
        raise NunchakuError(f"{label}: is of GGML's type {number}, which is none of {known}")
    if isinstance(kind, Kind) and (not shape or shape[-1] % kind.values):
        raise NunchakuError(f"{label}: damaged: {kind.name} has blocks of {kind.values}, and it the shape {shape}")
    return name, Stored(shape, kind, start)


def _placed(found: dict[str, Stored], reader: _Reader, alignment: Any) -> dict[str, Stored]:
    """Tensors with their places in the file; all must lie in it, and none in another."""
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise NunchakuError(f"{reader.label}: damaged: its alignment is {alignment}")
    data = -(-reader.file.tell() // alignment) * alignment
    placed = {name: stored._replace(start=data + stored.start) for name, stored in found.items()}
    end, before = data, ""
    for name, stored in sorted(placed.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start < end:
            raise NunchakuError(f"{reader.label}: {shown(name)}: damaged: it shares bytes with {shown(before)}")
        end, before = stored.start + stored.nbytes, name
        if end > reader.size:
            raise NunchakuError(f"{reader.label}: {shown(name)}: cut short or damaged: it ends at byte {end} of "
                                f"{reader.size}")
    return placed
