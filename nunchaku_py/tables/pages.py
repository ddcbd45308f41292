"""Memory that is mapped from a file, given back to the system: it reads it again where it is touched."""
from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

PAGEOUT = 21  # Linux's MADV_PAGEOUT: pages that differ from the file are kept, so that nothing can be lost
Span = tuple[int, int]  # [start, stop) of addresses


def mapped_files() -> list[Span]:
    """What of this process's memory is mapped from files; nothing where that cannot be known."""
    try:
        with open("/proc/self/maps") as lines:
            entries = [line.split(maxsplit=5) for line in lines]
    except OSError:
        return []
    return [_span(entry[0]) for entry in entries if len(entry) == 6 and entry[5].startswith("/")]


def _span(text: str) -> Span:
    start, stop = text.split("-")
    return int(start, 16), int(stop, 16)


def give_back(tensors: Iterable[Tensor], files: list[Span]) -> int:
    """Of tensors that lie in mapped files all whole pages; how many bytes of pages these are."""
    spans = [_whole_pages(tensor) for tensor in tensors if tensor.device.type == "cpu"]
    return sum(stop - start for start, stop in spans if stop > start and sys.platform == "linux"
               and any(first <= start and stop <= last for first, last in files) and _page_out(start, stop))


def _whole_pages(tensor: Tensor) -> Span:
    start, size = tensor.data_ptr(), mmap.PAGESIZE
    return -(-start // size) * size, (start + tensor.nbytes) // size * size


def _page_out(start: int, stop: int) -> bool:
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), PAGEOUT) == 0
