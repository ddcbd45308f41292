"""Reading and writing the tensors of safetensors files one at a time: nothing else of a file need be in memory."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from ..errors import NunchakuError
from .headers import DTYPE_BITS, LONGEST, METADATA, TensorHeader, read_header, shown
from .mapping import MappedFile, map_file

PathLike = str | os.PathLike[str]
Layout = Mapping[str, tuple[Iterable[int], torch.dtype]]  # name → (shape, dtype)
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: place for place, name in enumerate(DTYPE_BITS)}


class TensorFile:
    """One safetensors file, or several that hold one model; a context manager.

    label: for sentences. tensors: what their headers say, by name. metadata: of all; where two disagree, of the first.
    `read` copies a tensor into memory of its own: pages of a mapped file would count as the process's beside what is
    made of them, and lie where the file puts them rather than where torch aligns what it allocates. `view` maps."""

    def __init__(self, paths: PathLike | Iterable[PathLike]) -> None:
        files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        self.paths = [Path(path) for path in files]
        self.label = str(self.paths[0]) if self.paths else "no file"
        self.tensors: dict[str, TensorHeader] = {}
        self.metadata: dict[str, str] = {}
        self._path_of: dict[str, Path] = {}
        self._files: dict[Path, IO[bytes]] = {}
        self._mappings: dict[Path, MappedFile] = {}
        for path in self.paths:
            header = read_header(path)
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise NunchakuError(f"{path}: {shown(name)}: is also in {self._path_of[name]}")
                self.tensors[name], self._path_of[name] = tensor, path
            self.metadata = {**header.metadata, **self.metadata}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._mappings.clear()  # tensors in them keep them

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._path_of[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor in memory of its own; of its first axis only `rows`, (first, last + 1), where they are given."""
        path, entry, dtype = self._find(name)
        label = f"{path}: {shown(name)}"
        try:
            shape = entry.shape if rows is None else (rows[1] - rows[0], *entry.shape[1:])
            tensor = torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's default is
        except RuntimeError as error:
            raise NunchakuError(f"{label}: there is no memory for its {entry.nbytes} bytes") from error
        try:
            memory = _bytes_of(tensor)
            before = 0 if rows is None or not len(memory) else rows[0] * (len(memory) // shape[0])
            missing = self._fill(memory, path, entry.start + before)
        except OSError as error:
            raise NunchakuError(f"{label}: cannot be read: {error}") from error
        if missing:
            raise NunchakuError(f"{label}: cut short: {missing} of its {len(memory)} bytes are missing")
        return tensor

    def view(self, name: str) -> torch.Tensor:
        """A tensor that is memory of the mapped file; or one of its own, where it lies askew for its type."""
        path, entry, dtype = self._find(name)
        if path not in self._mappings:
            self._mappings[path] = map_file(path)
        found = self._mappings[path].view(entry, dtype)
        return self.read(name) if found is None else found

    def _find(self, name: str) -> tuple[Path, TensorHeader, torch.dtype]:
        if name not in self.tensors:
            raise NunchakuError(f"{self.label}: holds no tensor {shown(name)}")
        path, entry = self._path_of[name], self.tensors[name]
        if entry.dtype not in DTYPES:
            raise NunchakuError(f"{path}: {shown(name)}: dtype {shown(entry.dtype)} is not one that this release reads")
        return path, entry, DTYPES[entry.dtype]

    def _fill(self, memory: memoryview, path: Path, start: int) -> int:
        """How many bytes the file lacks."""
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
        file, done = self._files[path], 0
        file.seek(start)
        while done < len(memory):  # one call reads up to 2 GB
            count = file.readinto(memory[done:])
            if not count:
                break
            done += count
        return len(memory) - done


def layout_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What `write_tensors` has to know of tensors before they come."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write_tensors(path: PathLike, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]],
                  metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as its tensors come, in any order; only the one at hand is in memory.

    The same tensors and metadata give the same bytes. An interrupted file is not a valid one: write to another name
    and rename. Errors of the disk stay OSErrors, for the caller knows the file's final name."""
    text, places = _header_text(Path(path), layout, metadata)
    waiting = dict(places)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if name not in waiting:
                raise NunchakuError(f"{path}: {shown(name)}: {'came twice' if name in places else 'was not announced'}")
            start = waiting.pop(name) + 8 + len(text)
            shape, dtype = layout[name]
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise NunchakuError(f"{path}: {shown(name)}: announced as {tuple(shape)} {dtype}, "
                                    f"came as {tuple(tensor.shape)} {tensor.dtype}")
            if file.tell() != start:
                file.seek(start)
            file.write(_bytes_of(tensor))
        if waiting:
            raise NunchakuError(f"{path}: {len(waiting)} tensors never came, {shown(min(waiting))} among them")


def _header_text(path: Path, layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header, padded to 8 bytes, and where in the data each tensor begins. Widest types first, so that every
    tensor is aligned to its type."""
    for key, value in metadata.items():
        if len(value) > METADATA:
            raise NunchakuError(f"{path}: {shown(key)} in its metadata has {len(value)} characters, "
                                f"more than {METADATA}")
    for name, (_, dtype) in layout.items():
        if dtype not in NAMES:
            raise NunchakuError(f"{path}: {shown(name)}: safetensors files hold no {dtype}")
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places, end = {}, 0
    for name in sorted(layout, key=lambda name: (-_ORDER[NAMES[layout[name][1]]], name)):
        shape, dtype = layout[name]
        places[name], end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > LONGEST:
        raise NunchakuError(f"{path}: its header would have {len(text)} bytes, more than {LONGEST}")
    return text.ljust(-(-len(text) // 8) * 8), places


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Of a fresh tensor its own memory, of others what they would be on the CPU in a row."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(bytearray())
