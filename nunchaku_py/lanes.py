"""Threads that run one at a time and are held at the entry of every block of a model by a gate, which stands as the
block's instance-level forward: so that several forwards go through each block together, while it is in memory.
"""

import contextvars
import functools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .collect import Collector


class Stop(BaseException):
    """Unwinds a lane. No Exception, so that no model catches it."""


class Lane(threading.Thread):
    """A computation of its own, such as one state's forward. It runs only between `go` and its next pause, while
    whoever called `go` waits."""

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        super().__init__(name="nunchaku_py calibration", daemon=True)
        self.work, self.device = work, device
        self.at: str | None = None  # the block it is held at; None before it has begun and once it has returned
        self.calls: Counter[str] = Counter()  # how often it has come to each block
        self.output = self.error = None
        self.stopping = False
        self.orders, self.pauses = queue.SimpleQueue(), queue.SimpleQueue()
        self.context, self.surroundings = contextvars.copy_context(), _surroundings(device)

    def run(self) -> None:
        try:
            self.orders.get()
            self.check()
            self.output = self.context.run(self._work)
        except Stop:
            pass
        except BaseException as error:  # handed to the caller by go()
            self.error = error
        self.at = None
        self.pauses.put(None)

    def _work(self) -> Any:
        with self.surroundings, torch.no_grad():
            return self.work()

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
            raise Stop


def check_current_lane() -> None:
    """Lets an interrupted lane end at the next site already, not only at the end of its block."""
    lane = threading.current_thread()
    if isinstance(lane, Lane):
        lane.check()


@contextmanager
def stopped_at_the_end(lanes: Sequence[Lane]) -> Iterator[None]:
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


class Gate:
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
        if not isinstance(lane, Lane):
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
def closed(gates: Mapping[str, Gate]) -> Iterator[None]:
    with ExitStack() as stack:
        for gate in gates.values():
            gate.close()
            stack.callback(gate.open)
        yield


@contextmanager
def opened(gate: Gate) -> Iterator[None]:
    """For the caller the block is itself: it may be run, copied, given another forward."""
    gate.open()
    try:
        yield
    finally:
        gate.close()
