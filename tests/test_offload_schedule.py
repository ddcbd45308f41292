"""Which blocks stay within a budget, and in which order the others are copied and computed from two buffers."""
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from nunchaku_py import NunchakuError
from nunchaku_py.offload.budget import choose
from nunchaku_py.offload.schedule import Schedule
from nunchaku_py.sizes import parse_size


# -------------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize("text, nbytes", [("4GB", 4 * 10**9), ("4 GiB", 2**32), ("1.5gb", 15 * 10**8), ("7", 7),
                                          ("200MB", 2 * 10**8), (12, 12), (1e9, 10**9), ("8B", 8)])
def test_sizes(text: Any, nbytes: int) -> None:
    assert parse_size(text, "vram") == nbytes


@pytest.mark.parametrize("text", ["", "four GB", "4XB", "-1GB", -1, True, float("nan"), None, [4]])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(NunchakuError, match="vram: expected a size such as '4GB'"):
        parse_size(text, "vram")


@pytest.mark.parametrize("sizes", [[10] * 7, [30, 30, 10, 10, 10], [5], []])
def test_plans_fit_and_take_as_many_blocks_as_do(sizes: list[int]) -> None:
    for budget in range(4 + sum(sizes) + 20):
        try:
            plan = choose(sizes, 4, budget, "vram")
        except NunchakuError:
            assert budget < 4 + min(sum(sizes), 2 * max(sizes, default=0))
            continue
        streamed = [sizes[i] for i in plan.streamed]
        assert sorted((*plan.resident, *plan.streamed)) == list(range(len(sizes)))
        assert plan.nbytes == 4 + sum(sizes[i] for i in plan.resident) + 2 * max(streamed, default=0) <= budget
        assert len(streamed) > 2 or not streamed  # two buffers hold two blocks
        if len(set(sizes)) == 1 and streamed:
            assert plan.nbytes + sizes[0] > budget


def test_resident_blocks_lie_among_the_streamed_ones() -> None:
    assert choose([1] * 9, 0, 5, "vram").resident == (0, 3, 6)
    assert choose([9, 9, 1, 1], 0, 19, "vram").resident == (2,)


def test_a_budget_that_is_too_small_says_which_is_not() -> None:
    with pytest.raises(NunchakuError, match="two of its blocks 60.00 MB; the least that works is vram='61.24MB'"):
        choose([30_000_000] * 4, 1_234_567, 61_000_000, "vram")
    assert choose([30_000_000] * 4, 1_234_567, parse_size("61.24MB", "vram"), "vram").resident == ()


# ------------------------------------------------------------------------------------------------------------- schedule
class Device:
    """Two queues that are worked off in any order that the waits allow. What is computed must find its block in the
    buffer from its beginning to its end, also if as much as possible is copied in between."""

    def __init__(self) -> None:
        self.queues: dict[str, list[tuple]] = {"copy": [], "compute": []}

    def copy(self, block: int, slot: int) -> None:
        self.queues["copy"].append(("copy", slot, block))

    def compute(self, block: int, slot: int) -> None:
        self.queues["compute"] += [("begin", slot, block), ("end", slot, block)]

    def mark_copy(self) -> tuple[str, int]:
        return "copy", len(self.queues["copy"])

    def mark_compute(self) -> tuple[str, int]:
        return "compute", len(self.queues["compute"])

    def copy_waits(self, mark: Any) -> None:
        self.queues["copy"].append(("wait", *mark))

    def compute_waits(self, mark: Any) -> None:
        self.queues["compute"].append(("wait", *mark))

    def wrong(self, prefer: Callable[[], str]) -> list[tuple]:
        """What found another block in its buffer."""
        done, buffers, found = {"copy": 0, "compute": 0}, [None, None], []
        while any(done[name] < len(queue) for name, queue in self.queues.items()):
            name = prefer()
            name = name if self._can(name, done) else {"copy": "compute", "compute": "copy"}[name]
            assert self._can(name, done), "both queues wait for each other"
            what, slot, block = self.queues[name][done[name]]
            done[name] += 1
            if what == "copy":
                buffers[slot] = block
            elif what in ("begin", "end") and buffers[slot] != block:
                found.append((what, block, buffers[slot]))
        return found

    def _can(self, name: str, done: dict[str, int]) -> bool:
        if done[name] == len(self.queues[name]):
            return False
        what, queue, count = self.queues[name][done[name]]
        return what != "wait" or done[queue] >= count

    def copies(self) -> list[int]:
        return [block for what, _, block in self.queues["copy"] if what == "copy"]


ORDERS = {"as announced": [0, 1, 2, 3, 4] * 3, "another": [3, 1, 4, 0, 2] * 3, "some left out": [0, 2, 4] * 4,
          "twice in a row": [0, 0, 1, 1, 2, 2] * 2, "to and fro": [0, 1, 0, 1, 2, 0], "one alone": [2] * 4,
          "at random": random.Random(0).choices(range(5), k=60)}


def played(schedule: type[Schedule], order: list[int], device: Device | None = None) -> list[tuple]:
    """All wrong computations, over several ways in which the two queues may run."""
    device = device or Device()
    plan = schedule(device, range(5))
    for block in order:
        slot = plan.enter(block)
        device.compute(block, slot)
        plan.leave(slot)
    rng = random.Random(1)
    ways = [lambda: "copy", lambda: "compute", *[lambda: rng.choice(("copy", "compute"))] * 20]
    return [wrong for way in ways for wrong in device.wrong(way)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_blocks_are_there_while_they_compute(order: list[int]) -> None:
    assert played(Schedule, order) == []


class CopiesAtOnce(Device):
    def copy_waits(self, mark: Any) -> None:
        """Into a buffer that is still being computed from."""


class ComputesAtOnce(Device):
    def compute_waits(self, mark: Any) -> None:
        """From a buffer whose copy is under way."""


class MarksTooEarly(Schedule):
    def enter(self, block: int) -> int:
        slot = super().enter(block)
        self.slots[slot].read = self.lanes.mark_compute()
        return slot

    def leave(self, slot: int) -> None:
        """The mark is of before the computation."""


class SameBuffer(Schedule):
    def _slot_of(self, block: int) -> int | None:
        return super()._slot_of(block) and 0


@pytest.mark.parametrize("schedule, device", [(Schedule, CopiesAtOnce), (Schedule, ComputesAtOnce),
                                              (MarksTooEarly, Device), (SameBuffer, Device)])
def test_planted_mistakes_are_found(schedule: type[Schedule], device: type[Device]) -> None:
    assert played(schedule, ORDERS["as announced"], device())


def test_every_block_is_copied_once_a_step_and_ahead() -> None:
    device = Device()
    schedule = Schedule(device, range(5))
    for step in range(3):
        for block in range(5):
            schedule.leave(schedule.enter(block))
            assert device.copies()[-1] == (block + 1) % 5  # the last block brings the first of the next step
        assert device.copies() == [0, 1, 2, 3, 4] * (step + 1) + [0]


def test_another_order_is_learnt_in_a_step() -> None:
    device = Device()
    schedule, order = Schedule(device, range(5)), [3, 1, 4, 0, 2]
    for _ in range(2):
        for block in order:
            schedule.leave(schedule.enter(block))
    before = len(device.copies())
    for block in order:
        schedule.leave(schedule.enter(block))
    assert device.copies()[before:] == [1, 4, 0, 2, 3]


def test_what_was_forgotten_is_copied_again() -> None:
    device = Device()
    schedule = Schedule(device, range(5))
    schedule.leave(schedule.enter(0))
    schedule.forget(1)
    schedule.leave(schedule.enter(1))
    assert device.copies() == [0, 1, 1, 2]
