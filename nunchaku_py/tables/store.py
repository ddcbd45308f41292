"""Tables of what modulation linears gave, which know an input by its bytes: nothing else is ever taken for it.

A modulation linear reads one row per image and step, made of the timestep, the guidance and the pooled prompt. Its
output for that row is computed once, by the very call that the model would make, and is looked up from then on.
"""
from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import NunchakuError
from ..module_tools import is_offloaded, move_only
from ..ops.registry import forced_backend
from ..precision import as_autocast
from .foresee import Foresight, ModelCall, Reached
from .host import is_away, visiting

MOST_ROWS = 64  # of an input that is looked up: a linear that reads more is no table's business
NOT_COMPILED = ("the weights of this modulation linear have left the device, and compiled graphs read no tables: call "
                "nq.cache_modulation(model, weights=\"device\") or nq.cache_modulation(model, False) before compiling")
Key = tuple[Any, ...]
Seen = tuple[weakref.ref, int, Key]  # an input, its version, and its key


class Answer(NamedTuple):
    """An output; its version betrays whoever writes into it. ahead: it was computed for a step to come."""

    y: Tensor
    version: int
    ahead: bool


class Counts:
    """hits: looked up. misses: computed when they were asked for. foreseen: rows computed ahead, of `schedules`."""

    def __init__(self) -> None:
        self.hits = self.misses = self.foreseen = self.schedules = 0


class LinearTable:
    """Of one linear: inputs → outputs, valid for the tensors (`stamp`) that they were computed with."""

    def __init__(self, tables: Tables, home: torch.device) -> None:
        self.tables, self.home = tables, home  # home: where the model is; weights may be on the host meanwhile
        self.answers: dict[Key, Answer] = {}
        self.stamp: list[tuple[Tensor, int]] = []
        self.leader: LinearTable | None = None  # the first that reads what this one reads; None: it has not run yet
        tables.members.append(self)

    def __reduce__(self) -> tuple:  # copies begin empty
        return LinearTable, (self.tables, self.home)

    def answer(self, site: Any, x: Tensor) -> Tensor:
        """What the linear gives for x."""
        if torch.compiler.is_compiling():
            if is_away(site, x.device):
                raise NunchakuError(NOT_COMPILED)
            return site.run(x)
        x = as_autocast(x)
        if is_own_business(site, x):
            with visiting(site, x.device):
                return site.run(x)
        return self.tables.look_up(self, site, x)

    def find(self, site: Any, key: Key) -> Answer | None:
        if not _same(self.stamp, stamp_of(site)):
            self.clear()
            return None
        found = self.answers.get(key)
        return found if found is not None and found.y._version == found.version else None

    def compute(self, site: Any, key: Key, x: Tensor, ahead: bool) -> Tensor:
        """By the call that the model makes: another number of rows would round sums otherwise. Not in inference mode,
        whose tensors do not count their versions."""
        with torch.inference_mode(False), torch.no_grad():
            y = site.run(x)
        stamp = stamp_of(site)
        if not _same(self.stamp, stamp):
            self.clear()
            self.stamp = stamp
        self.tables.forget_one(self, key)
        self.tables.book(key, y.nbytes)  # first: no answer is without its bytes, whenever Ctrl-C comes
        self.answers[key] = Answer(y, y._version, ahead)
        return y

    def clear(self) -> None:
        for key in list(self.answers):
            self.tables.forget_one(self, key)
        self.stamp = []

    def is_away(self, site: Any) -> bool:
        return is_away(site, self.home)

    def device(self, site: Any) -> torch.device:
        """Where the linear's inputs are."""
        return self.home if self.is_away(site) else site.codes.device

    def nbytes(self) -> int:
        return sum(answer.y.nbytes for answer in self.answers.values())

    def move(self, fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """fn's change of device, for a tensor of the linear; but to the host where its weights stay there."""
        target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
        if target != self.home:
            self.home = target
            self.clear()
        stays = self.tables.host and tensor.device.type == "cpu" and target.type not in ("cpu", "meta")
        return tensor if stays else move_only(fn, tensor)


class _Now(threading.local):
    """What a thread is about."""

    call: ModelCall | None = None
    sought: LinearTable | None = None  # by a call of the model that only learns what this one reads


class Tables:
    """Those of all modulation linears of a model. host: whether weights stay on the host, and are brought for a call
    that needs them; on a CPU, pages of files are given back. limit: bytes of outputs that are kept, those that were
    needed last. pipeline: whose scheduler says what timesteps come."""

    def __init__(self, host: bool, limit: int, pipeline: weakref.ref | None = None) -> None:
        self.host, self.limit, self.pipeline = host, limit, pipeline
        self.members: list[LinearTable] = []
        self.order: OrderedDict[Key, int] = OrderedDict()  # input → bytes of its outputs, those needed last at the end
        self.bytes = 0
        self.given_back = 0  # bytes of weights in pages of files that are not needed while a schedule is in the table
        self.counts, self.foresight = Counts(), Foresight()
        self.now, self._lock = _Now(), threading.RLock()
        self._seen: Seen | None = None

    def __reduce__(self) -> tuple:
        return Tables, (self.host, self.limit)

    # -------------------------------------------------------------------------------------------- hooks of the model
    def enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.now.call = ModelCall(model, args, kwargs)

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.now.call = None

    # ------------------------------------------------------------------------------------------------------- looking up
    def look_up(self, table: LinearTable, site: Any, x: Tensor) -> Tensor:
        with self._lock:
            return self._looked_up(table, site, x) if self.now.sought is None else self._passed_by(table, site, x)

    def _looked_up(self, table: LinearTable, site: Any, x: Tensor) -> Tensor:
        key, call = self.key_of(x), self.now.call
        leads = call is not None and call.meets(table, key)
        found = table.find(site, key)
        if found is None and leads and self.foresight.fill(self, call, table, x):
            found = table.find(site, key)
        if found is not None:
            self.counts.hits += 1
            if found.ahead and leads:
                self.foresight.came()
            self.order.move_to_end(key)
            return found.y
        self.counts.misses += 1
        with visiting(site, x.device):
            return self.keep(table, site, key, x)

    def _passed_by(self, table: LinearTable, site: Any, x: Tensor) -> Tensor:
        """While the model runs to learn what the linear that is sought reads."""
        if table is self.now.sought:
            raise Reached(x)
        found = table.find(site, self.key_of(x))
        if found is not None:
            return found.y
        with visiting(site, x.device):
            return site.run(x)

    def key_of(self, x: Tensor) -> Key:
        """All that an output depends on but for the tensors of the linear: bits, shape, dtype, device, backend. Blocks
        read the same tensor, of which one copy to the host is enough."""
        counts = not x.is_inference()
        if counts and self._seen is not None and self._seen[0]() is x and self._seen[1] == x._version:
            return (*self._seen[2][:-1], forced_backend())
        data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        key = (data, x.shape, x.dtype, x.device, forced_backend())
        self._seen = (weakref.ref(x), x._version, key) if counts else None
        return key

    def keep(self, table: LinearTable, site: Any, key: Key, x: Tensor, ahead: bool = False) -> Tensor:
        y = table.compute(site, key, x, ahead)
        self.order.move_to_end(key)
        while self.bytes > self.limit and len(self.order) > 1:
            self._forget(next(iter(self.order)))
        return y

    def book(self, key: Key, nbytes: int) -> None:
        self.order[key] = self.order.get(key, 0) + nbytes
        self.bytes += nbytes

    def _forget(self, key: Key) -> None:
        for member in self.members:
            self.forget_one(member, key)
        self.bytes -= self.order.pop(key, 0)

    def forget_one(self, table: LinearTable, key: Key) -> None:
        gone = table.answers.pop(key, None)
        if gone is None:
            return
        self.bytes -= gone.y.nbytes
        self.order[key] -= gone.y.nbytes
        if not self.order[key]:
            del self.order[key]

    def clear(self) -> None:
        for member in self.members:
            member.clear()
        self._seen = None


def is_own_business(site: Any, x: Tensor) -> bool:
    """Whether a call is the linear's own business: training, rows of an image, no data, or hooks that bring weights
    for each call anyway."""
    if x.is_meta or not x.numel() or x.numel() // x.shape[-1] > MOST_ROWS or is_offloaded(site):
        return True
    return x.requires_grad and torch.is_grad_enabled()


def stamp_of(site: Any) -> list[tuple[Tensor, int]]:
    """All tensors that an output was computed with, adapters included, and their versions."""
    tensors = (*site._parameters.values(), site.adapter_down, site.adapter_up)
    return [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors if tensor is not None]


def _same(some: list[tuple[Tensor, int]], others: list[tuple[Tensor, int]]) -> bool:
    return len(some) == len(others) and all(
        one[0] is other[0] and one[1] == other[1] for one, other in zip(some, others, strict=True))
