"""Runs calibration forwards side by side, block by block, through any model, whatever wires its blocks together.

Each state's forward is a lane, held at the entry of every block. Once all lanes have come to a block, they run it one
after the other while the inputs of its sites are collected; then the caller quantizes the block; then the lanes go on,
with the 16-bit output or, with feedback, with that of the quantized block. Only one thread runs at any time: the order
of all work, and with it every bit, is fixed. In memory stand the live activations of the held forwards and one block's
statistics.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .calibrate import State
from .collect import Collector, SiteTap, tapped
from .errors import NunchakuError
from .lanes import Gate, Lane, check_current_lane, closed, opened, stopped_at_the_end
from .methods.work import Stats
from .progress import Progress
from .residence import Residence

UNREACHED = "no calibration forward reaches it"
TapsOf = Callable[[str], Mapping[Any, SiteTap]]
Finish = Callable[[str, dict[Any, Stats]], None]


def replay(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    states: Sequence[State],
    taps_of: TapsOf,
    finish: Finish,
    *,
    feedback: bool = False,
    sample: int = 512,
    residence: Residence | None = None,
    progress: Progress | None = None,
    on_output: Callable[[int, Any], None] | None = None,
) -> dict[str, str]:
    """Calls finish(block name, {key: Stats}) for each block in the order in which the first state's forward reaches
    them, with the statistics of its taps {key: SiteTap} over all states; returns {block name: reason} of the others.

    A block is any module by its name in the model, a single linear too. A tapped module that no forward calls has no
    entry in the statistics. `finish` may change the block, or put another module in its place.
    A block that is called several times per forward is finished at its last call; with feedback it then runs quantized
    from this call on. `residence`: where to compute, one block at a time, if the model as a whole does not fit there.
    """
    _check(model, blocks, states)
    residence = residence or Residence(model, blocks, None)
    gates = {name: Gate(model, name, block) for name, block in blocks.items()}
    with torch.no_grad(), residence, closed(gates):
        order = _order_of_first(model, states[0], residence)
        lanes = [_lane(model, state, residence.device) for state in states]
        with stopped_at_the_end(lanes):
            schedule = _Schedule(lanes, gates, order, residence, taps_of, finish, feedback, sample, progress)
            schedule.run()
        for i, lane in enumerate(lanes):
            if on_output is not None:
                on_output(i, lane.output)
    return {name: UNREACHED for name in blocks if name not in schedule.finished}


def _check(model: nn.Module, blocks: Mapping[str, nn.Module], states: Sequence[State]) -> None:
    if not states:
        raise NunchakuError("calibration states: expected at least one, got none")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise NunchakuError(f"{name or type(model).__name__}: it is compiled; quantize first, then compile")
    names = {block: name for name, block in blocks.items()}
    for name, block in blocks.items():
        inner = next((names[module] for module in block.modules() if names.get(module, name) != name), None)
        if inner is not None:
            raise NunchakuError(f"blocks: {inner!r} is or lies inside {name!r}; blocks must be apart from each other")


def _lane(model: nn.Module, state: State, device: torch.device) -> Lane:
    def forward() -> Any:
        args, kwargs = state.on(device)
        return model(*args, **kwargs)

    return Lane(forward, device)


def _order_of_first(model: nn.Module, state: State, residence: Residence) -> list[str]:
    """The blocks in the order in which the first state's forward calls them: one more forward, but then the last call
    of every block is known, and a model that refuses the states says so before anything is changed."""
    lane, order = _lane(model, state, residence.device), []
    with stopped_at_the_end([lane]):
        try:
            lane.go()
            while lane.at is not None:
                order.append(lane.at)
                with residence.of(lane.at):
                    lane.go()
                lane.go()
        except (NunchakuError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            name = type(model).__name__
            raise NunchakuError(f"calibration state 0: {name} fails on it: {type(error).__name__}: {error}") from error
    return order


@dataclass
class _Schedule:
    """Drives the lanes: of the blocks that lanes are held at, the earliest in the first state's order comes next."""

    lanes: Sequence[Lane]
    gates: Mapping[str, Gate]
    order: Sequence[str]
    residence: Residence
    taps_of: TapsOf
    finish: Finish
    feedback: bool
    sample: int
    progress: Progress | None
    collectors: dict[str, dict[Any, Collector]] = field(default_factory=dict)  # of blocks begun and not finished
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.total: Counter[str] = Counter()  # calls per forward
        self.places: dict[tuple[str, int], int] = {}  # (block, which of its calls) -> place in the order
        for place, name in enumerate(self.order):
            self.total[name] += 1
            self.places[name, self.total[name]] = place

    def run(self) -> None:
        for lane in self.lanes:
            lane.go()
        while held := [lane for lane in self.lanes if lane.at is not None]:
            place = min(map(self.place, held))
            self.visit([lane for lane in held if self.place(lane) == place])
        for name in list(self.collectors):  # called less often than by the first state's first forward
            with self.residence.of(name):
                self.conclude(name)

    def place(self, lane: Lane) -> tuple[int, str]:
        """Calls that the first state's forward does not make come first: what follows them waits for these lanes."""
        return self.places.get((lane.at, lane.calls[lane.at]), -1), lane.at

    def visit(self, lanes: Sequence[Lane]) -> None:
        name = lanes[0].at
        if name in self.finished:
            raise NunchakuError(
                f"{name}: calibration state {self.lanes.index(lanes[0])} calls it again after it was quantized, for it "
                "takes another way through the model than state 0; calibrate with states of one kind"
            )
        last = lanes[0].calls[name] >= self.total[name]
        with self.residence.of(name):
            self.collect(name, lanes, self.feedback and last)
            if last:
                self.conclude(name)
            for lane in lanes:
                lane.go()

    def collect(self, name: str, lanes: Sequence[Lane], again: bool) -> None:
        if name not in self.collectors:
            calls = len(self.lanes) * max(1, self.total[name])
            taps = self.taps_of(name).items()
            self.collectors[name] = {key: Collector(_spoken(key), tap, calls, self.sample) for key, tap in taps}
        gate, inner = self.gates[name], []
        for collector in self.collectors[name].values():
            (gate.collectors if collector.tap.module is gate.block else inner).append(collector)
        with tapped(inner, check_current_lane):
            for number, lane in enumerate(lanes, 1):
                if self.progress is not None:
                    self.progress.say(f"{name}, state {number} of {len(lanes)}")
                lane.go(again)
        gate.collectors = []

    def conclude(self, name: str) -> None:
        collectors = self.collectors.pop(name)
        stats = {key: collectors.pop(key).stats() for key in list(collectors) if collectors[key].rows}
        if self.progress is not None:
            self.progress.say(name)
        with opened(self.gates[name]):
            self.finish(name, stats)
        self.finished.add(name)


def _spoken(key: Any) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
