"""The tensors of a block: finding them, seeing whether they have changed, laying them in one buffer, and putting
others of the same values in their places.

Parameters keep their identity and get other data; of buffers the entry in the module's table changes. What packing
derives for quantized linears, and the branches of adapters, are buffers: they come along.
"""
from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 512  # bytes: what torch allocates on a GPU is a multiple of it, and no kernel asks for more
Table = dict[str, Tensor | None]


@dataclass
class Held:
    """One tensor, and the tables where it stands: linears that share an input share a branch."""

    tensor: Tensor
    places: list[tuple[Table, str]]

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.tensor, nn.Parameter):
            self.tensor.data = tensor
            return
        for table, name in self.places:
            table[name] = tensor
        self.tensor = tensor


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None:
                    yield tensor


def held_by(modules: Iterable[nn.Module], without: Container[int] = ()) -> list[Held]:
    """Each tensor once; without: ids of those that are not meant."""
    found: dict[int, Held] = {}
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in without:
                    found.setdefault(id(tensor), Held(tensor, [])).places.append((table, name))
    return list(found.values())


@torch.inference_mode(False)
@torch.no_grad()
def move(held: Iterable[Held], device: torch.device) -> None:
    for one in held:
        one.put(one.tensor.detach().to(device))


def nbytes_on_gpu(held: Iterable[Held]) -> int:
    return sum(-(-one.tensor.nbytes // ALIGNMENT) * ALIGNMENT for one in held)


def version_of(tensors: Iterable[Tensor]) -> int:
    """Grows with every change in place. Inference tensors count none."""
    return sum(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def fused_in(modules: Iterable[nn.Module]) -> list[tuple[str, float | None]]:
    """Adapters that are fused, and their scales: torch counts no version where PEFT adds them to a weight's `.data`."""
    return [(name, getattr(module, "scaling", {}).get(name)) for module in modules
            for name in getattr(module, "merged_adapters", ())]


class Layout:
    """Where in a buffer each of some tensors lies; the same shapes, types and strides anywhere."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.parts: list[tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]] = []
        self.nbytes = 0
        for tensor in tensors:
            strides = torch.empty_like(tensor, device="meta").stride()
            nbytes = tensor.numel() * tensor.element_size()
            self.parts.append((self.nbytes, nbytes, tensor.dtype, tensor.shape, strides))
            self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        """buffer: bytes, from a multiple of ALIGNMENT on."""
        return [torch.as_strided(buffer[start:start + nbytes].view(dtype), shape, strides) if nbytes
                else torch.empty(shape, dtype=dtype, device=buffer.device)
                for start, nbytes, dtype, shape, strides in self.parts]
