"""Computing a model on a device that holds only one of its blocks at a time, beside what lies outside the blocks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


class Residence:
    """Within it (`with`) all that lies outside the blocks is on `device`; within `of(name)` that block is, too.

    device=None: the model stays where it is, and `device` is where its first parameter is.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device | str | None) -> None:
        self.model, self.blocks, self.moves = model, blocks, device is not None
        self.device = torch.device(device) if self.moves else _home(model)
        self.homes: list[tuple[torch.Tensor, torch.device]] = []

    def __enter__(self) -> "Residence":
        if self.moves:
            inside = {tensor for block in self.blocks.values() for tensor in _tensors(block)}
            self.homes = [(tensor, tensor.device) for tensor in _tensors(self.model) if tensor not in inside]
            try:
                for tensor, _ in self.homes:
                    tensor.data = tensor.data.to(self.device)
            except BaseException:  # it may not fit: nothing is left half moved
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        while self.homes:
            tensor, home = self.homes.pop()
            tensor.data = tensor.data.to(home)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        block = self.blocks[name]
        home = _home(block)
        if not self.moves or home == self.device:
            yield
            return
        try:
            block.to(self.device)
            yield
        finally:
            block.to(home)
            self.model.get_submodule(name).to(home)  # another module may have taken its place


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


def _home(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))
