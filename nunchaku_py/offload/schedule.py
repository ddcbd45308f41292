"""In which order blocks are copied into two buffers, and what waits for what. Nothing here touches a tensor.

Two queues run beside each other: one copies, one computes. Before block i computes, the copy of it must be done; while
it computes, the block after it is copied into the other buffer, once what computed from there before is done.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Mark = Any  # an event of a device: what a queue had been given when it was made


class Lanes(Protocol):
    """The two queues of a device."""

    def copy(self, block: int, slot: int) -> None:
        """Give the copying queue a copy of the block into that buffer."""

    def mark_copy(self) -> Mark: ...

    def mark_compute(self) -> Mark: ...

    def copy_waits(self, mark: Mark) -> None: ...

    def compute_waits(self, mark: Mark) -> None: ...


@dataclass
class Slot:
    """A buffer: which block is in it, or on its way there; when that has arrived; when it was last computed from."""

    block: int | None = None
    copied: Mark = None
    read: Mark = None


class Schedule:
    """Blocks are entered and left one after another, in an order that is learnt: after each block the one is expected
    that came after it last time, at first the next of `order`; after the last one the first, of the next step."""

    def __init__(self, lanes: Lanes, order: Sequence[int]) -> None:
        self.lanes, self.slots = lanes, [Slot(), Slot()]
        self.after = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self.last: int | None = None
        self.current = 1  # the buffer of the last block

    def enter(self, block: int) -> int:
        """The buffer that the block can be computed from; the next one is on its way to the other."""
        if self.last is not None and self.last != block:
            self.after[self.last] = block
        self.last = block
        slot = self._slot_of(block)
        if slot is None:
            slot = 1 - self.current  # the other one may still be computed from
            self._fetch(block, slot)
        self.current = slot
        self.lanes.compute_waits(self.slots[slot].copied)
        ahead = self.after[block]
        if self._slot_of(ahead) is None:
            self._fetch(ahead, 1 - slot)
        return slot

    def leave(self, slot: int) -> None:
        """What was to be computed from the buffer has been given to the device."""
        self.slots[slot].read = self.lanes.mark_compute()

    def forget(self, block: int) -> None:
        """What has been copied of the block is out of date."""
        for slot in self.slots:
            if slot.block == block:
                slot.block = None

    def _slot_of(self, block: int) -> int | None:
        return next((number for number, slot in enumerate(self.slots) if slot.block == block), None)

    def _fetch(self, block: int, slot: int) -> None:
        to = self.slots[slot]
        if to.read is not None:
            self.lanes.copy_waits(to.read)
        self.lanes.copy(block, slot)
        to.block, to.copied = block, self.lanes.mark_copy()
