"""The header of a safetensors file, read without its tensors: a few kilobytes of a file of any size.

A file is 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}, "__metadata__": {…}}, data.
"""
from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import NunchakuError

_LONGEST = 100_000_000  # bytes of JSON; what the safetensors library allows


@dataclass(frozen=True)
class TensorHeader:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Refuses a file that is not safetensors, or whose header lies about its length."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(size - 8, _LONGEST):
                raise NunchakuError(f"{path}: not a safetensors file, or cut short within its header "
                                    f"(the file is {size} bytes)")
            table = json.loads(file.read(length))
        return _parsed(path, table, size - 8 - length)
    except OSError as error:
        raise NunchakuError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, NunchakuError):
            raise
        raise NunchakuError(f"{path}: not a safetensors file: its header cannot be understood ({error})") from error


def _parsed(path: Path, table: dict, data: int) -> Header:
    metadata = table.pop("__metadata__", None) or {}
    tensors, end = {}, 0
    for name, entry in table.items():
        first, last = entry["data_offsets"]
        tensors[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), last - first)
        end = max(end, last)
    if end != data:
        raise NunchakuError(f"{path}: cut short or damaged: its header promises {end} bytes of tensors, it has {data}")
    return Header(tensors, metadata)
