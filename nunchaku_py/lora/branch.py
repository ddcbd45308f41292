"""Adapters in the low-rank branch of a quantized linear.

    down' = [down; A₁; A₂; …]        up' = [up, scale₁·B₁, scale₂·B₂, …]

Sites that read one quantized input (q, k, v) share one down', which holds the A of all of them, and each takes its own
columns of h = x·down'ᵀ. So the input is quantized once, whatever adapters each of them has. A strength is written into
columns of up' and changes no shape; nor does anything else where room is reserved (`reserve`).
"""
from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..division import as_given, as_read
from ..module_tools import used_on
from .compress import shrink

Columns = tuple[tuple[int, int], ...]  # [start, stop) in h
CUDA_RANKS = 16  # the CUDA kernels multiply by so many ranks at a time, and would pad on every call
_names = count(1)
_noted: ContextVar[_Notes | None] = ContextVar("nunchaku_py_noted_folds", default=None)


class Adapter(NamedTuple):
    """scale · up · down, from the modules that hold a LoRA's factors; of a part of a linear: its input columns."""

    down: nn.Module  # weight (r,K) or (r,K,1,1)
    up: nn.Module  # weight (N,r) or (N,r,1,1)
    scale: float
    first: int = 0
    last: int | None = None
    original: bool = True  # of the model as it was trained, which a divided site differs from

    def rows(self, site: Any) -> Tensor:
        """(r,K) of the site's down'."""
        rows = self.down.weight.detach().flatten(1)[:, self.first:self.last]
        return as_read(rows, site) if self.original else rows

    def columns(self, site: Any) -> Tensor:
        """(N,r) of the site's up' at scale 1."""
        columns = self.up.weight.detach().flatten(1)
        return as_given(columns, site) if self.original else columns

    @property
    def rank(self) -> int:
        return self.down.weight.shape[0]


class Room(NamedTuple):
    """Ranks reserved for adapters; and how many they may take at most, where that loses no more than `tolerance`."""

    reserved: int = 0
    most: int | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class _Factor:
    """Stands for a module that holds half of an adapter."""

    weight: Tensor


class InputGroup:
    """Sites that may share an input. It knows them weakly: a model is freed when it is let go of."""

    def __init__(self) -> None:
        self._sites: list[weakref.ref] = []

    @staticmethod
    def of(sites: Sequence[Any]) -> None:
        group = InputGroup()
        group._sites = [weakref.ref(site) for site in sites]
        for site in sites:
            site.group = group

    def sites(self) -> list[Any]:
        return [site for site in (ref() for ref in self._sites) if site is not None]

    def __reduce__(self) -> tuple:
        return InputGroup, (), self.sites()

    def __setstate__(self, sites: list[Any]) -> None:
        self._sites = [weakref.ref(site) for site in sites]


def own_columns(h: Tensor, columns: Columns) -> Tensor:
    """A site's own columns of the h of its group, contiguous."""
    if columns == ((0, h.shape[1]),):
        return h
    return torch.cat([h[:, start:stop] for start, stop in columns], 1)


# -------------------------------------------------------------------------------------------------- placing and writing
@dataclass
class _Places:
    """The rows of a shared down' as they are handed out."""

    rows: list[Tensor]

    def put(self, rows: Tensor, again: bool) -> tuple[int, int]:
        """Where these rows stand. again: the same rows may stand for two sites, as they do in a LoRA that was trained
        on one fused q/k/v."""
        start = self.rows[0].shape[0]
        for other in self.rows[1:]:
            stop = start + other.shape[0]
            if again and other.shape == rows.shape and torch.equal(other, rows):
                return start, stop
            start = stop
        self.rows.append(rows)
        return start, start + rows.shape[0]


class _Notes:
    """What `at_once` defers: layers that are to look what they hold, sites to write, and whether anew."""

    def __init__(self) -> None:
        self.layers: dict[Any, None] = {}
        self.sites: dict[Any, bool] = {}

    def write(self) -> None:
        done: set[Any] = set()
        try:
            for site in [site for site, anew in self.sites.items() if anew]:
                if site not in done:
                    done.update(_fold(site))
            for site in self.sites:
                if site not in done:
                    rescale(site)
        except BaseException:  # no memory, or Ctrl-C: what was not written must not pass for it
            for layer in self.layers:
                layer.forget()
            raise


@contextmanager
def at_once() -> Iterator[None]:
    """Within it `fold` and `rescale` only take note; what they are to write is written once, at the end."""
    if _noted.get() is not None:
        yield
        return
    notes = _Notes()
    token = _noted.set(notes)
    try:
        yield
    finally:
        try:
            for layer in list(notes.layers):
                layer.look()
        finally:
            _noted.reset(token)
            notes.write()


def looks_later(layer: Any) -> bool:
    """Whether the layer will be told to look again at the end of `at_once`."""
    if (notes := _noted.get()) is None:
        return False
    notes.layers[layer] = None
    return True


def fold(site: Any) -> None:
    """Write the branch of `site` and of all that share its input, in place where nothing changes its shape."""
    if (notes := _noted.get()) is not None:
        notes.sites[site] = True
    else:
        _fold(site)


def _fold(site: Any) -> list[Any]:
    """As fold; gives the sites. What it makes in inference mode must be writable outside."""
    members = alike(site)
    with torch.inference_mode(False), torch.no_grad(), present(members):
        if not any(member.adapters or member.adapter_room.reserved for member in members):
            for member in members:
                member.set_branch(None, None, None, "")
            return members
        joint, branches = branches_of(members)
        if all(_fits(member, joint, *branch) for member, branch in zip(members, branches, strict=True)):
            for member, (up, _) in zip(members, branches, strict=True):
                member.adapter_down.copy_(joint)
                member.adapter_up.copy_(up)
            return members
        name = f"+{next(_names)}"
        for member, branch in zip(members, branches, strict=True):
            member.set_branch(joint, *branch, name)
        return members


def branches_of(members: Sequence[Any], padded: bool = True) -> tuple[Tensor, list[tuple[Tensor, Columns]]]:
    """(the down' of all, and the up' of each with its columns)."""
    first = members[0]
    down = first.down.data if first.site.rank else first.codes.new_empty((0, first.rows_in), dtype=first.file_dtype)
    places, taken = _Places([down]), [compressed(member)[0] for member in members]
    columns = [_place(*one, places, padded) for one in zip(members, taken, strict=True)]
    return torch.cat(places.rows), [(_up(*one), one[2]) for one in zip(members, taken, columns, strict=True)]


def alike(site: Any) -> list[Any]:
    """The site, and those of its group that quantize their input with the same tensors."""
    if site.group is None or not site.site.has_smooth:
        return [site]
    with present(site.group.sites()):
        return [other for other in site.group.sites() if other.input_digest() == site.input_digest()]


def compressed(site: Any) -> tuple[tuple[Adapter, ...], float]:
    """The site's adapters, as one of fewer ranks where the room is for fewer; and what share of their product is
    lost."""
    room, adapters = site.adapter_room, site.adapters
    if room.most is None or sum(adapter.rank for adapter in adapters) <= room.most:
        return adapters, 0.0
    up = torch.cat([adapter.scale * adapter.columns(site).float() for adapter in adapters], 1)
    down = torch.cat([adapter.rows(site).float() for adapter in adapters])
    up, down, lost = shrink(up, down, room.most, room.tolerance)
    if lost > room.tolerance:
        return adapters, 0.0
    return (Adapter(_Factor(down), _Factor(up), 1.0, original=False),), lost


def _place(site: Any, adapters: Sequence[Adapter], places: _Places, padded: bool) -> Columns:
    """Columns of h for the site's stored branch, its adapters, and its room."""
    found = [(0, places.rows[0].shape[0])]
    own = 0
    again = not (padded and site.adapter_room.reserved)
    for adapter in adapters:
        rows = adapter.rows(site).to(places.rows[0])
        found.append(places.put(rows, again))
        own += rows.shape[0]
    if padding := _padding(site, own) if padded else 0:
        found.append(places.put(places.rows[0].new_zeros(padding, site.rows_in), again))
    return _joined(found)


def _padding(site: Any, own: int) -> int:
    """Ranks that are zero: of the room reserved, or up to what the kernels multiply at a time."""
    if room := site.adapter_room.reserved:
        return max(-own % room, room - own)
    return -(site.site.rank + own) % CUDA_RANKS if own and used_on(site).type == "cuda" else 0


def _joined(spans: list[tuple[int, int]]) -> Columns:
    found = [spans[0]]
    for start, stop in spans[1:]:
        if start == found[-1][1]:
            found[-1] = (found[-1][0], stop)
        elif stop > start:
            found.append((start, stop))
    return tuple(found)


def _up(site: Any, adapters: Sequence[Adapter], columns: Columns) -> Tensor:
    """(N, own ranks): the stored up, then every adapter's at its strength, then zeros."""
    kind = {"dtype": site.file_dtype, "device": site.codes.device}
    up = torch.empty(site.rows_out, sum(stop - start for start, stop in columns), **kind)
    if site.site.rank:
        up[:, :site.site.rank] = site.up.data
    up[:, _write_strengths(site, adapters, up):] = 0
    return up


def _fits(site: Any, down: Tensor, up: Tensor, columns: Columns) -> bool:
    """Whether it can be written where the site's present branch is, which a compiled graph may have taken."""
    pairs = (site.adapter_down, down), (site.adapter_up, up)
    return site.adapter_columns == columns and all(
        (old.shape, old.device) == (new.shape, new.device) for old, new in pairs)


def rescale(site: Any) -> None:
    """Write the strengths of a site's adapters: nothing else has changed."""
    if (notes := _noted.get()) is not None:
        notes.sites.setdefault(site, False)
        return
    if site.adapter_room.most is not None:
        _fold(site)  # the strengths may be in a product
        return
    with torch.inference_mode(False), torch.no_grad(), present([site]):
        _write_strengths(site, site.adapters, site.adapter_up)


def _write_strengths(site: Any, adapters: Sequence[Adapter], up: Tensor) -> int:
    """scale·B of every adapter, rounded once; gives where they end."""
    start = site.site.rank
    for adapter in adapters:
        own = adapter.columns(site).to(up.device)
        stop = start + own.shape[1]
        torch.mul(own, adapter.scale, out=up[:, start:stop])
        start = stop
    return start


# -------------------------------------------------------------------------------------------------------------- offload
def present(sites: Sequence[Any]) -> AbstractContextManager[Any]:
    """Within it the tensors of sites and of their adapters have data, also where accelerate keeps them elsewhere."""
    modules = [*sites, *(half for site in sites for adapter in site.adapters for half in adapter[:2])]
    absent = {id(module): module for module in modules
              if any(p is not None and p.is_meta for p in module._parameters.values())}
    if not absent:
        return nullcontext()
    from accelerate.utils import align_module_device

    stack = ExitStack()
    for module in absent.values():
        stack.enter_context(align_module_device(module))
    return stack
