"""Runs calibration forwards side by side, block by block, through any model, whatever wires its blocks together.

Each state's forward runs in a thread of its own (a lane) and is held at the entry of every block by a gate, which
stands as the block's instance-level forward. Once all lanes have come to a block, they run it one after the other
while the inputs of its sites are collected; then the caller quantizes the block; then the lanes go on, with the 16-bit
output or, with feedback, with that of the quantized block. Only one thread runs at any time: the order of all work,
and with it every bit, is fixed. In memory stand the live activations of the held forwards and one block's statistics.
"""

import contextvars
import functools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .calibrate import State
from .collect import Collector, SiteTap, tapped
from .errors import NunchakuError
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
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    on_output: Callable[[int, Any], None] | None = None,
) -> dict[str, str]:
    """Calls finish(block name, {key: Stats}) for each block in the order in which the first state's forward reaches
    them, with the statistics of its taps {key: SiteTap} over all states; returns {block name: reason} of the others.

    A block is any module by its name in the model, a single linear too. A tapped module that no forward calls has no
    entry in the statistics. `finish` may change the block, or put another module in its place.
    A block that is called several times per forward is finished at its last call; with feedback it then runs quantized
    from this call on. `device`: where to compute, one block at a time, if the model as a whole does not fit there.
    """
    _check(model, blocks, states)
    residence = Residence(model, blocks, device)
    gates = {name: _Gate(model, name, block) for name, block in blocks.items()}
    with torch.no_grad(), residence, _closed(gates):
        order = _order_of_first(model, states[0], residence)
        lanes = [_Lane(model, state, residence.device) for state in states]
        with _stopped_at_the_end(lanes):
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


class _Stop(BaseException):
    """Unwinds a lane. No Exception, so that no model catches it."""


class _Lane(threading.Thread):
    """One state's forward. It runs only between `go` and its next pause, while whoever called `go` waits."""

    def __init__(self, model: nn.Module, state: State, device: torch.device) -> None:
        super().__init__(name="nunchaku_py calibration", daemon=True)
        self.model, self.state, self.device = model, state, device
        self.at: str | None = None  # the block it is held at; None once it has returned
        self.calls: Counter[str] = Counter()  # how often it has come to each block
        self.output = self.error = None
        self.stopping = False
        self.orders, self.pauses = queue.SimpleQueue(), queue.SimpleQueue()
        self.context, self.surroundings = contextvars.copy_context(), _surroundings(device)

    def run(self) -> None:
        try:
            self.orders.get()
            self.check()
            self.output = self.context.run(self._forward)
        except _Stop:
            pass
        except BaseException as error:  # handed to the caller by go()
            self.error = error
        self.at = None
        self.pauses.put(None)

    def _forward(self) -> Any:
        with self.surroundings, torch.no_grad():
            args, kwargs = self.state.on(self.device)
            return self.model(*args, **kwargs)

    def go(self, order: bool = False) -> None:
        """Lets it run to its next pause; `order` is what its present pause returns."""
        if self.ident is None:
            self.start()
        self.orders.put(order)
        self.pauses.get()
        if self.device.type == "cuda":
            # cuBLAS keeps a workspace of megabytes per thread; with it given back there is one, not one per lane.
            torch._C._cuda_clearCublasWorkspaces()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def pause(self, at: str) -> bool:
        self.check()
        self.at = at
        self.pauses.put(None)
        order = self.orders.get()
        self.check()
        return order

    def check(self) -> None:
        if self.stopping:
            raise _Stop


def _check_current_lane() -> None:
    """Lets an interrupted lane end at the next site already, not only at the end of its block."""
    lane = threading.current_thread()
    if isinstance(lane, _Lane):
        lane.check()


@contextmanager
def _stopped_at_the_end(lanes: Sequence[_Lane]) -> Iterator[None]:
    try:
        yield
    finally:
        for lane in lanes:
            lane.stopping = True
            lane.orders.put(False)
        for lane in lanes:
            if lane.ident is not None:
                lane.join()


@contextmanager
def _entered(*managers: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


def _surroundings(device: torch.device) -> Any:
    """What torch keeps per thread and a lane must take over from its caller: autocast, default device, CUDA stream."""
    kind, default, managers = device.type, torch.get_default_device(), []
    if torch.is_autocast_enabled(kind):
        managers.append(torch.autocast(kind, torch.get_autocast_dtype(kind)))
    if default.type != "cpu":
        managers.append(torch.device(default))
    if kind == "cuda":
        managers.append(torch.cuda.stream(torch.cuda.current_stream(device)))
    return _entered(*managers)


class _Gate:
    """Stands as a block's forward: a lane is held before the block and behind it, anyone else passes."""

    def __init__(self, model: nn.Module, name: str, block: nn.Module) -> None:
        self.model, self.name, self.block = model, name, block
        self.collectors: list[Collector] = []  # of the block's own input: its hooks run before a lane is held

    def close(self) -> None:
        self.was_own = "forward" in vars(self.block)
        self.forward = self.block.forward
        functools.update_wrapper(self, self.forward, updated=())  # models look at the signatures of their blocks
        self.block.forward = self

    def open(self) -> None:
        if self.was_own:
            self.block.forward = self.forward
        else:
            del self.block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lane = threading.current_thread()
        if not isinstance(lane, _Lane):
            return self.forward(*args, **kwargs)
        lane.calls[self.name] += 1
        again = lane.pause(self.name)
        for collector in self.collectors:
            collector.take(args, kwargs)
        if again:  # on copies, since blocks may change their inputs, and without keeping the output
            copied_args, copied_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            self.forward(*copied_args, **copied_kwargs)
            del copied_args, copied_kwargs
        output = None if again else self.forward(*args, **kwargs)
        lane.pause(self.name)
        return self.present()(*args, **kwargs) if again else output

    def present(self) -> Callable[..., Any]:
        """What computes the block now: itself, or the module that has taken its place."""
        module = self.model.get_submodule(self.name)
        return self.forward if module is self.block else module


@contextmanager
def _closed(gates: Mapping[str, _Gate]) -> Iterator[None]:
    with ExitStack() as stack:
        for gate in gates.values():
            gate.close()
            stack.callback(gate.open)
        yield


@contextmanager
def _opened(gate: _Gate) -> Iterator[None]:
    """For the caller the block is itself: it may be run, copied, given another forward."""
    gate.open()
    try:
        yield
    finally:
        gate.close()


def _order_of_first(model: nn.Module, state: State, residence: Residence) -> list[str]:
    """The blocks in the order in which the first state's forward calls them: one more forward, but then the last call
    of every block is known, and a model that refuses the states says so before anything is changed."""
    lane, order = _Lane(model, state, residence.device), []
    with _stopped_at_the_end([lane]):
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

    lanes: Sequence[_Lane]
    gates: Mapping[str, _Gate]
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

    def place(self, lane: _Lane) -> tuple[int, str]:
        """Calls that the first state's forward does not make come first: what follows them waits for these lanes."""
        return self.places.get((lane.at, lane.calls[lane.at]), -1), lane.at

    def visit(self, lanes: Sequence[_Lane]) -> None:
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

    def collect(self, name: str, lanes: Sequence[_Lane], again: bool) -> None:
        if name not in self.collectors:
            calls = len(self.lanes) * max(1, self.total[name])
            taps = self.taps_of(name).items()
            self.collectors[name] = {key: Collector(_spoken(key), tap, calls, self.sample) for key, tap in taps}
        gate, inner = self.gates[name], []
        for collector in self.collectors[name].values():
            (gate.collectors if collector.tap.module is gate.block else inner).append(collector)
        with tapped(inner, _check_current_lane):
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
        with _opened(self.gates[name]):
            self.finish(name, stats)
        self.finished.add(name)


def _spoken(key: Any) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
