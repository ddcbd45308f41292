"""A model on a device that holds some of its blocks, and two buffers through which the others come and go."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NunchakuError
from ..linear import QuantizedSite
from ..models.discover import blocks_of
from ..models.pattern import pattern_of
from ..module_tools import Berth
from ..progress import Progress
from ..sizes import shown
from ..tables.foresee import tables_of
from .block import Block
from .budget import Plan, choose
from .hook import UNDO, Hook, NotCopied
from .lanes import device_of, host_memory, lanes_on
from .schedule import Schedule
from .tensors import Held, held_by, move, nbytes_on_gpu

CPU = torch.device("cpu")


class Streaming(NotCopied):
    """What `nq.offload(model, vram=…)` makes of a model, until `undo`."""

    def __init__(self, model: nn.Module, budget: int, device: torch.device | str | None) -> None:
        self.model, self.budget, self.device = model, budget, device_of(device)
        self.home = _home_of(model)
        named = blocks_of(model, pattern_of(model))
        if not named:
            raise NunchakuError(f"nq.offload: {type(model).__name__} has no repeated blocks that could be streamed")
        self.shared: set[int] = set()  # ids of tensors that stay although blocks hold them
        self.blocks = [Block(name, block, Berth(self.device, self.visit, number), self.shared)
                       for number, (name, block) in enumerate(named.items())]
        self.buffers: list[Tensor] = []
        self.inside: tuple[int, int] | None = None  # the block that computes, its buffer
        self.parked = False  # whether it has made room for another model
        self.handles: list[Any] = []
        self.lanes = lanes_on(self.device, self._copy)
        try:
            self.plan, sizes = self._place()
            self.schedule = Schedule(self.lanes, self.plan.streamed)
            self._fill(sizes)
        except BaseException:  # it may not fit: nothing is left half moved
            self.undo()
            raise
        self._attach()

    # ---------------------------------------------------------------------------------------------------------- placing
    def _place(self) -> tuple[Plan, list[int]]:
        """Pack everything on the device once, one block at a time; what is outside the blocks stays there. Then it is
        known how large they are there."""
        common = _in_several(self.model, [block.module for block in self.blocks])
        move(common, self.device)
        self.shared.update(id(held.tensor) for held in common)
        sizes = []
        with Progress(len(self.blocks), "pack blocks") as progress:
            for block in self.blocks:
                progress.say(block.name)
                sizes.append(block.pack())
                move(block.held(), CPU)
                block.berth.away = True
                progress.advance(1)
        rest = self._rest()
        berth = Berth(self.device)
        move(rest, self.device)
        for module in self.model.modules():
            if isinstance(module, QuantizedSite) and module.berth is None:
                module.berth = berth
                module.pack()
        return choose(sizes, nbytes_on_gpu(self._rest()), self.budget, "vram"), sizes

    def _fill(self, sizes: list[int]) -> None:
        for number in self.plan.resident:
            self.blocks[number].pack()
        memories = host_memory([sizes[number] for number in self.plan.streamed], self.device)
        for number, memory in zip(self.plan.streamed, memories, strict=True):
            self.blocks[number].store(memory)
        self._make_buffers(max((sizes[number] for number in self.plan.streamed), default=0))

    def _rest(self) -> list[Held]:
        inside = {id(module) for block in self.blocks for module in block.module.modules()}
        outside = [module for module in self.model.modules() if id(module) not in inside]
        rest = {id(held.tensor): held for held in held_by(outside)}
        everything = held_by(self.model.modules())
        return [held for held in everything if id(held.tensor) in rest or id(held.tensor) in self.shared]

    def _make_buffers(self, nbytes: int) -> None:
        """Two of so many bytes, in the place of those that there are."""
        self.lanes.finish()
        for number in self.plan.streamed:
            self.schedule.forget(number)
            self.blocks[number].forget_buffers()
        self.buffers = []
        with torch.inference_mode(False):
            for _ in range(2 if nbytes else 0):
                self.buffers.append(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        self.lanes.finish()

    def _attach(self) -> None:
        for number in self.plan.streamed:
            module = self.blocks[number].module
            self.handles += [module.register_forward_pre_hook(Hook(self.enter, number), prepend=True),
                             module.register_forward_hook(Hook(self.leave, number), always_call=True)]
        self.model._apply = _Guard(self)

    # -------------------------------------------------------------------------------------------------------- computing
    def enter(self, number: int) -> None:
        """The block is about to compute."""
        self._leave_interrupted()
        block = self.blocks[number]
        if block.changed_away():
            self._restore(number)
        elif block.outdated():
            self.schedule.forget(number)
        slot = self.schedule.enter(number)
        self.inside = number, slot
        block.put_in(slot, self.buffers[slot])

    def leave(self, number: int) -> None:
        """The block has computed, as far as the program is concerned."""
        if self.inside is None or self.inside[0] != number:
            return
        slot = self.inside[1]
        block, self.inside = self.blocks[number], None
        if block.changed_within(slot, self.buffers[slot]):
            self._restore(number)
        else:
            block.put_away()
        self.schedule.leave(slot)

    def _leave_interrupted(self) -> None:
        """Ctrl-C kept a block from being left."""
        if self.inside is not None:
            self.leave(self.inside[0])

    def visit(self, number: int, entering: bool) -> None:
        """A block is looked at outside of a call."""
        self.come_back()
        if number in self.plan.streamed:
            (self.enter if entering else self.leave)(number)

    def make_room(self) -> None:
        """All blocks leave the device until `come_back`: another model of the pipeline needs it."""
        if self.parked:
            return
        self._leave_interrupted()
        self.parked = True
        self._make_buffers(0)
        for number in self.plan.resident:
            block = self.blocks[number]
            move(block.held(), CPU)
            block.berth.away = True

    def come_back(self) -> None:
        if self.parked:
            self.parked = False
            for number in self.plan.resident:
                self.blocks[number].pack()
            self._make_buffers(max((self.blocks[number].layout.nbytes for number in self.plan.streamed), default=0))

    def _restore(self, number: int) -> None:
        block = self.blocks[number]
        block.restore()
        self.schedule.forget(number)
        if block.layout.nbytes > self.buffers[0].numel():  # adapters have been loaded
            self._make_buffers(block.layout.nbytes)

    def _copy(self, number: int, slot: int) -> tuple[Tensor, Tensor]:
        source = self.blocks[number].source()
        return source, self.buffers[slot][:source.numel()]

    # ----------------------------------------------------------------------------------------------------------- ending
    @torch.inference_mode(False)
    @torch.no_grad()
    def undo(self) -> None:
        """Everything where it was, in memory of its own, packed for that."""
        self.lanes.finish()
        vars(self.model).pop("_apply", None)
        while self.handles:
            self.handles.pop().remove()
        for block in self.blocks:
            block.give_back(self.home)
        move(held_by(self.model.modules()), self.home)
        for site in (module for module in self.model.modules() if isinstance(module, QuantizedSite)):
            site.berth = None
            site._unpack()
            site.pack()
        self.buffers = []

    def line(self) -> str:
        resident, streamed = ([self.blocks[number] for number in kind] for kind in (self.plan.resident,
                                                                                    self.plan.streamed))
        a_step = sum(block.layout.nbytes for block in streamed)
        return (f"offload: {len(resident)} of {len(self.blocks)} blocks stay on {self.device}, {len(streamed)} are "
                f"streamed to it, {shown(a_step)} a step; {shown(self.plan.nbytes)} of {shown(self.budget)} taken")


class _Guard(NotCopied):
    """Stands for `_apply` of the model: its tensors stay where streaming holds them; casts pass."""

    def __init__(self, streaming: Streaming) -> None:
        self.streaming = streaming

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        model, device = self.streaming.model, self.streaming.device
        to = fn(torch.empty(0, device=device)).device
        if to != device:
            raise NunchakuError(f"the {type(model).__name__} is offloaded by nq.offload, which holds it on {device} as "
                                f"far as it fits, and cannot be moved to {to}; {UNDO}")

        def stays(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype)

        return type(model)._apply(model, stays, recurse)


def _home_of(model: nn.Module) -> torch.device:
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if torch.device("meta") in homes:
        raise NunchakuError("nq.offload: the model has no weights here (meta device); load it before")
    if any(table.is_away(site) for site, table in tables_of(model)):
        raise NunchakuError("nq.offload: the modulation linears of this model are on the host while it is on a GPU; "
                            "call nq.cache_modulation(model, False) before: tables are not used beside vram=")
    if len(homes) > 1:
        raise NunchakuError(f"nq.offload: the model lies on {' and '.join(sorted(map(str, homes)))}; move it to one "
                            "device before")
    return homes.pop()


def _in_several(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Held]:
    """Tensors that more than one block holds, or a block and what is outside."""
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    counts = Counter(id(held.tensor) for modules in (outside, *(block.modules() for block in blocks))
                     for held in held_by(modules))
    return [held for held in held_by(model.modules()) if counts[id(held.tensor)] > 1]
