"""The two queues of a device that blocks are streamed to, and the host memory that they come from."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import NunchakuError
from .tensors import ALIGNMENT

PIECE = 2**30  # bytes that are pinned at a time: torch rounds each up to a power of two
Copy = Callable[[int, int], tuple[Tensor, Tensor]]  # (block, slot) → what is copied, where to


class CudaLanes:
    """Computing on whatever stream is current when a block is called; copying on one of its own."""

    def __init__(self, device: torch.device, find: Copy) -> None:
        self.device, self.find = device, find
        self.copying = torch.cuda.Stream(device)

    def copy(self, block: int, slot: int) -> None:
        source, target = self.find(block, slot)
        with torch.cuda.stream(self.copying):
            target.copy_(source, non_blocking=True)

    def mark_copy(self) -> torch.cuda.Event:
        return self.copying.record_event()

    def mark_compute(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy_waits(self, mark: torch.cuda.Event) -> None:
        self.copying.wait_event(mark)

    def compute_waits(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """Wait for everything on the device: memory is about to change hands between streams."""
        torch.cuda.synchronize(self.device)


class HostLanes:
    """A device that copies at once, and is never ahead of the program: the CPU in the place of a GPU."""

    def __init__(self, device: torch.device, find: Copy) -> None:
        self.find = find

    def copy(self, block: int, slot: int) -> None:
        source, target = self.find(block, slot)
        target.copy_(source)

    def mark_copy(self) -> None: ...

    def mark_compute(self) -> None: ...

    def copy_waits(self, mark: None) -> None: ...

    def compute_waits(self, mark: None) -> None: ...

    def finish(self) -> None: ...


def lanes_on(device: torch.device, find: Copy) -> CudaLanes | HostLanes:
    return (CudaLanes if device.type == "cuda" else HostLanes)(device, find)


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that is meant, with its number."""
    found = torch.device("cuda" if device is None else device)
    if found.type == "cpu":
        return found
    if found.type != "cuda" or not torch.cuda.is_available():
        raise NunchakuError(f"nq.offload: vram= streams blocks to a GPU, and there is no {found} here; what bounds the "
                            "memory of a model that computes on the CPU is nq.load(path, mmap=True) and ram=")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def host_memory(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """A buffer of bytes for each size, pinned where they are for a GPU."""
    pieces: list[list[int]] = []
    for size in sizes:
        if not pieces or sum(pieces[-1]) + size + ALIGNMENT > PIECE:
            pieces.append([])
        pieces[-1].append(size)
    found = []
    for piece in pieces:
        memory = torch.empty(sum(piece) + ALIGNMENT, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        memory = memory[-memory.data_ptr() % ALIGNMENT:]
        start = 0
        for size in piece:
            found.append(memory[start:start + size])
            start += size
    return found
