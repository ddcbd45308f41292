"""Tensors that are memory of a mapped safetensors file: pages of it come when they are read, and may go again."""
from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakSet

import torch

from ..errors import NunchakuError
from .headers import TensorHeader

PAGE = mmap.PAGESIZE
PAGEMAP = "/proc/self/pagemap"  # 8 bytes for each page of this process
# Elsewhere the call is missing, or only a hint; and it must be known what has been written.
CAN_DROP = sys.platform == "linux" and os.access(PAGEMAP, os.R_OK)
# On Linux: without setting aside memory for what might be written to it, which there may not be.
_FLAGS = ({"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
          if sys.platform == "linux" else {"access": mmap.ACCESS_COPY})


class MappedFile(mmap.mmap):
    """A file, as memory. What is written to it stays in this process. It lives as long as a tensor in it."""

    path: Path
    address: int

    def view(self, entry: TensorHeader, dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor of the file, or None where it lies askew for its type."""
        if entry.start % dtype.itemsize or not entry.nbytes:
            return None
        count = entry.nbytes // dtype.itemsize
        with torch.inference_mode(False):
            return torch.frombuffer(self, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


Span = tuple[MappedFile, int, int]  # from a byte of the file to another
_mappings: WeakSet[MappedFile] = WeakSet()


def map_file(path: Path) -> MappedFile:
    try:
        with path.open("rb") as file:
            mapping = MappedFile(file.fileno(), 0, **_FLAGS)
    except (OSError, ValueError) as error:
        raise NunchakuError(f"{path}: cannot be mapped into memory: {error}") from error
    mapping.path, mapping.address = path, torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    _mappings.add(mapping)
    return mapping


def is_mapped(tensor: torch.Tensor) -> bool:
    return _span_of(tensor) is not None


def spans_of(tensors: Iterable[torch.Tensor]) -> list[Span]:
    """Whole pages of mapped files that hold nothing but these tensors, none of which torch saw changed."""
    found = sorted((span for span in map(_span_of, tensors) if span), key=lambda span: (span[0].address, span[1]))
    joined: list[list] = []
    for mapping, start, stop in found:
        if joined and joined[-1][0] is mapping and start <= joined[-1][2]:
            joined[-1][2] = max(stop, joined[-1][2])
        else:
            joined.append([mapping, start, stop])
    whole = ((mapping, -(-start // PAGE) * PAGE, stop // PAGE * PAGE) for mapping, start, stop in joined)
    return [(mapping, start, stop) for mapping, start, stop in whole if start < stop]


def drop(spans: Iterable[Span]) -> None:
    """These pages are no memory of the process any more; reading them brings them back. Those that have been written to
    stay: torch does not count what is written to a parameter's `.data`, as PEFT does where it fuses adapters."""
    for mapping, begin, end in spans:
        for start, stop in _unwritten(mapping.address + begin, mapping.address + end):
            mapping.madvise(mmap.MADV_DONTNEED, start - mapping.address, stop - start)


def _unwritten(start: int, stop: int) -> list[tuple[int, int]]:
    """Parts of whole pages of a mapped file without the pages that this process has copies of."""
    with open(PAGEMAP, "rb", buffering=0) as file:
        pages = os.pread(file.fileno(), (stop - start) // PAGE * 8, start // PAGE * 8)
    flags = torch.frombuffer(bytearray(pages), dtype=torch.int64) >> 61 & 7  # in memory, in swap, a page of the file
    copies = [-1, *((flags > 1) & (flags & 1 == 0)).nonzero().flatten().tolist(), len(flags)]
    return [(start + (before + 1) * PAGE, start + after * PAGE)
            for before, after in zip(copies, copies[1:], strict=False) if after > before + 1]


def will_need(spans: Iterable[Span]) -> None:
    """Let the system begin to read them from the disk."""
    for mapping, start, stop in spans:
        mapping.madvise(mmap.MADV_WILLNEED, start, stop - start)


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Drop the pages of what is mapped among them."""
    if _mappings and CAN_DROP:
        drop(spans_of(tensors))


def _span_of(tensor: torch.Tensor) -> Span | None:
    if tensor.device.type != "cpu" or not tensor.numel() or tensor.is_inference() or tensor._version:
        return None
    start = tensor.data_ptr()
    for mapping in _mappings:
        if 0 <= start - mapping.address < len(mapping):
            start -= mapping.address
            return mapping, start, start + tensor.nbytes
    return None
