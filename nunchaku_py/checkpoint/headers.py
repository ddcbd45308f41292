"""The header of a safetensors file, read without its tensors: a few kilobytes of a file of any size. Without torch.

A file is 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}, "__metadata__": {…}}, data.
Nothing of a header is believed: what it says must be well formed, and must account for every byte of the data once.
"""
from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import NunchakuError

METADATA = 16 * 2**20  # characters of one metadata value, far above what the config of any model takes
LONGEST = 100_000_000  # bytes of JSON; what the safetensors library allows
_MOST_AXES = 64  # torch's limit
_MOST_ELEMENTS = 2**63
_FIELDS = {"dtype", "shape", "data_offsets"}
# Bits of an element, in the order of the safetensors library, by which it sorts the tensors it writes.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}


@dataclass(frozen=True)
class TensorHeader:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0  # of its bytes in the file


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Refuses a file that is not safetensors, and a header that contradicts itself or the length of the file."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(size - 8, LONGEST):
                raise NunchakuError(f"{path}: not a safetensors file, or cut short within its header "
                                    f"(the file is {size} bytes)")
            text = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, NunchakuError):
            raise
        raise NunchakuError(f"{path}: cannot be read: {error}") from error
    table = _table(path, text)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in table.items()}
    _check_places(path, tensors, 8 + length, size)
    return Header(tensors, metadata)


def packs_linears(header: Header) -> bool:
    """Whether these are linears as Nunchaku packs them. Others call their codes qweight, too, but not their scales."""
    packed = (name.removesuffix(".qweight") for name in header.tensors if name.endswith(".qweight"))
    return any(f"{name}.{leaf}" in header.tensors for name in packed for leaf in ("wscales", "scaled_zeros"))


def shown(name: str) -> str:
    """A name out of a file, fit to stand in a sentence."""
    text = name if name.isprintable() and name else ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


# ------------------------------------------------------------------------------------------------------------- parsing
def _table(path: Path, text: bytes) -> dict[str, Any]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise NunchakuError(f"{path}: not a safetensors file: its header cannot be understood ({why})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    for name in table:
        name.encode()  # JSON can spell half a surrogate pair, which nothing can print
    if len(table) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} stands there twice")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise NunchakuError(f"{path}: damaged: its __metadata__ is not a table of texts")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise NunchakuError(f"{path}: damaged: {shown(key)} in its __metadata__ is not a text")
        if len(value) > METADATA:
            raise NunchakuError(f"{path}: {shown(key)} in its __metadata__ has {len(value)} characters, "
                                f"more than {METADATA}")
    return metadata


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    label = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS or not isinstance(entry["dtype"], str):
        raise NunchakuError(f"{label}: damaged: its header is not a table of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > _MOST_AXES:
        raise NunchakuError(f"{label}: damaged: its shape is not a list of up to {_MOST_AXES} whole numbers")
    if math.prod(size or 1 for size in shape) >= _MOST_ELEMENTS:
        raise NunchakuError(f"{label}: damaged: its shape has more than 2^63 elements")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise NunchakuError(f"{label}: damaged: its data_offsets are not two ascending whole numbers")
    nbytes, bits = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BITS.get(dtype, 0)
    if dtype in DTYPE_BITS and bits != 8 * nbytes:
        raise NunchakuError(f"{label}: damaged: {dtype} {tuple(shape)} takes {-(-bits // 8)} bytes, it has {nbytes}")
    return TensorHeader(dtype, tuple(shape), nbytes, start + offsets[0])


def _whole_numbers(found: Any) -> bool:
    return isinstance(found, list) and all(type(value) is int and 0 <= value < _MOST_ELEMENTS for value in found)


def _check_places(path: Path, tensors: dict[str, TensorHeader], start: int, size: int) -> None:
    """One after the other, from the first byte of the data to the last."""
    promised = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=start)
    if promised != size:
        raise NunchakuError(f"{path}: cut short or damaged: its header promises {promised - start} bytes of tensors, "
                            f"it has {size - start}")
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            what = "shares bytes with" if tensor.start < end else "leaves a hole after"
            raise NunchakuError(f"{path}: {shown(name)}: damaged: it {what} the tensor before it")
        end += tensor.nbytes
