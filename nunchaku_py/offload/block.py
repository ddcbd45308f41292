"""One block that is streamed: its tensors in host memory, and in a buffer of the device while it computes."""
from __future__ import annotations

from collections.abc import Container
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import QuantizedSite
from ..module_tools import Berth
from .lanes import host_memory
from .tensors import Held, Layout, fused_in, held_by, move, tensors_of, version_of


class Block:
    """tensors: as `held_by` finds them; host: their bytes, one after another, as they are copied at once."""

    def __init__(self, name: str, module: nn.Module, berth: Berth, shared: Container[int]) -> None:
        self.name, self.module, self.berth, self.shared = name, module, berth, shared
        self.tensors: list[Held] = []
        self.order: list[int] = []  # which of them each place of the module holds
        self.host, self.layout = torch.empty(0, dtype=torch.uint8), Layout([])
        self.views: dict[int, list[Tensor]] = {}  # by buffer; of a slot, or -1: in host memory
        self.copied: Any = None  # by what `_stored` says, of what has been copied
        self.bound = -1  # version of what it was when it came

    # ---------------------------------------------------------------------------------------------------- on the device
    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> int:
        """Bring it to the device and derive what its linears want there; how many bytes that is."""
        move(self.held(), self.berth.device)
        self.berth.away = False
        for site in self._sites():
            site.berth = self.berth
            site.pack()
        return Layout([held.tensor for held in self.held()]).nbytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def store(self, memory: Tensor | None = None) -> None:
        """Take what its modules hold now to host memory, from wherever it is."""
        self.tensors = self.held()
        index = {id(held.tensor): number for number, held in enumerate(self.tensors)}
        self.order = [index[id(tensor)] for tensor in self._found()]
        self.layout = Layout([held.tensor for held in self.tensors])
        self.host = host_memory([self.layout.nbytes], self.berth.device)[0] if memory is None else memory
        self.views = {-1: self.layout.views(self.host)}
        for held, view in zip(self.tensors, self.views[-1], strict=True):
            view.copy_(held.tensor.detach())
        self.put_away()

    def restore(self) -> None:
        """Pack and store it anew: its tensors have been changed, replaced or joined by others."""
        self.pack()
        self.store()
        self.copied = None

    # ------------------------------------------------------------------------------------------------ coming and going
    def put_away(self) -> None:
        self._put(-1)
        self.berth.away = True

    def put_in(self, slot: int, buffer: Tensor) -> None:
        if slot not in self.views:
            with torch.inference_mode(False):
                self.views[slot] = self.layout.views(buffer)
        self._put(slot)
        self.berth.away = False
        self.bound = self._version(buffer)

    def forget_buffers(self) -> None:
        self.views = {-1: self.views[-1]} if self.views else {}

    def source(self) -> Tensor:
        """What is to be copied now."""
        self.copied = self._stored()
        return self.host[:self.layout.nbytes]

    def changed_away(self) -> bool:
        return not self._intact(-1)

    def outdated(self) -> bool:
        """Whether its values are others than those copied last."""
        return self.copied != self._stored()

    def changed_within(self, slot: int, buffer: Tensor) -> bool:
        return self.bound != self._version(buffer) or not self._intact(slot)

    def give_back(self, home: torch.device) -> None:
        """Into memory of its own."""
        for held in self.held():
            held.put(held.tensor.detach().to(home, copy=True))

    def _put(self, buffer: int) -> None:
        for held, view in zip(self.tensors, self.views[buffer], strict=True):
            held.put(view)

    def _intact(self, buffer: int) -> bool:
        """Whether all its places hold what was put there, and no new ones have come."""
        found = list(self._found())
        if len(found) != len(self.order):
            return False
        views = self.views[buffer]
        return all(tensor is self.tensors[number].tensor and tensor.data_ptr() == views[number].data_ptr()
                   for tensor, number in zip(found, self.order, strict=True))

    def _stored(self) -> tuple:
        """Changes with the values in host memory."""
        return self._version(self.host), fused_in(self.module.modules())

    def _version(self, buffer: Tensor) -> int:
        """Views count with their buffer, parameters for themselves."""
        parameters = (held.tensor for held in self.tensors if isinstance(held.tensor, nn.Parameter))
        return version_of(chain(parameters, (buffer,)))

    def _found(self) -> list[Tensor]:
        return [tensor for tensor in tensors_of(self.module.modules()) if id(tensor) not in self.shared]

    def held(self) -> list[Held]:
        return held_by(self.module.modules(), self.shared)

    def _sites(self) -> list[QuantizedSite]:
        return [module for module in self.module.modules()
                if isinstance(module, QuantizedSite) and id(module.codes) not in self.shared]
