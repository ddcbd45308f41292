"""A model on the CPU whose weights are pages of a mapped file: those of a block are dropped after it has computed,
unless they fit into what the process may hold; those of the next are asked for while it computes."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..checkpoint.mapping import CAN_DROP, drop, is_mapped, spans_of, will_need
from ..errors import NunchakuError
from ..models.discover import blocks_of
from ..models.pattern import pattern_of
from ..sizes import shown
from .budget import choose
from .hook import Hook, NotCopied


class Paging(NotCopied):
    """What `nq.offload(model, ram=…)` makes of a model, until `undo`."""

    device = None  # it stays where it is

    def __init__(self, model: nn.Module, budget: int) -> None:
        self.model, self.budget = model, budget
        self.handles: list[Any] = []
        if not CAN_DROP:
            raise NunchakuError("nq.offload: this system has no call that drops pages of a mapped file and spares what "
                                "was written, by which ram= bounds memory")
        self.blocks = list(blocks_of(model, pattern_of(model)).values())
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        rest = mapped_bytes(parameter for parameter in model.parameters() if id(parameter) not in inside)
        sizes = [mapped_bytes(block.parameters()) for block in self.blocks]
        if not sum(sizes):
            raise NunchakuError(f"nq.offload: the blocks of this {type(model).__name__} are not mapped from a file, "
                                "and ram= drops nothing else; nq.load(path, mmap=True) maps one")
        self.plan = choose(sizes, rest, budget, "ram")
        self.dropped = sum(sizes[number] for number in self.plan.streamed)
        self._attach()

    def _attach(self) -> None:
        drop(spans_of(self.model.parameters()))
        for number in self.plan.streamed:
            block, before = self.blocks[number], self.blocks[number - 1]
            self.handles += [before.register_forward_pre_hook(Hook(_ask, block), prepend=True),
                             block.register_forward_hook(Hook(_drop, block), always_call=True)]

    def undo(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def line(self) -> str:
        return (f"offload: the pages of {len(self.plan.resident)} of {len(self.blocks)} blocks stay in memory, those "
                f"of {len(self.plan.streamed)} are read from the file as they compute, {shown(self.dropped)} a step; "
                f"{shown(self.plan.nbytes)} of {shown(self.budget)} taken")


def _ask(block: nn.Module) -> None:
    will_need(spans_of(block.parameters()))


def _drop(block: nn.Module) -> None:
    drop(spans_of(block.parameters()))


def mapped_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if is_mapped(tensor))
