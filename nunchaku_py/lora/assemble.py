"""From the tensors of one foreign weight to the Delta of each module whose rows it holds."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from ..errors import NunchakuError
from . import lycoris
from .delta import Delta, Target
from .lycoris import Factors, Fit, Misfit
from .names import Place
from .tensors import State, number, weight

# What a change is made of: kind → sets of parts, one of which of every row a file must have.
_KINDS: dict[str, tuple[tuple[set[str], ...], ...]] = {
    "LoRA": (({"down"},), ({"up"},)),
    "LoHa": (({"hada_w1_a"},), ({"hada_w1_b"},), ({"hada_w2_a"},), ({"hada_w2_b"},)),
    "LoKr": (({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})),
    "diff": (({"diff"},),),
}


@dataclass(frozen=True)
class Group:
    """All keys of one foreign weight: part → key. shape is that of the weight, with the rows of all its modules."""

    component: str
    place: Place
    target: Target
    keys: dict[str, str]

    @property
    def sizes(self) -> list[int]:
        return [self.target.shapes[module][0] for module in self.place.modules]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(self.sizes), *self.target.shapes[self.place.modules[0]][1:]

    @property
    def name(self) -> str:
        return " with ".join(self.place.modules)

    @property
    def kind(self) -> str | None:
        """None where no part is a weight: an alpha or a bias alone changes nothing that a Delta holds."""
        kinds = [kind for kind, rows in _KINDS.items()
                 if any(part in self.keys for row in rows for parts in row for part in parts)]
        if len(kinds) > 1:
            keys = ", ".join(sorted(self.keys.values()))
            raise NunchakuError(f"{self.name}: expected one kind of change, got {' and '.join(kinds)} from {keys}")
        return kinds[0] if kinds else None

    def missing(self) -> str | None:
        """A phrase that says which half is not there."""
        for row in _KINDS[self.kind]:
            if not any(parts <= set(self.keys) for parts in row):
                return f"no {' or '.join(' with '.join(sorted(parts)) for parts in row)} beside {self._some_weight()}"
        return None

    def _some_weight(self) -> str:
        parts = {part for row in _KINDS[self.kind] for parts in row for part in parts}
        return next(self.keys[part] for part in sorted(parts & set(self.keys)))


def assemble(group: Group, state: State, fit: Fit) -> tuple[dict[str, Delta], list[str]]:
    """(module → Delta, keys whose tensors no Delta can hold)."""
    factors, scale = _READERS[group.kind](group, state, fit)
    up, down = factors
    alpha = down.shape[0] if scale is None else scale * down.shape[0]
    delta = Delta(_as_down(down, group), _as_up(up, group), float(alpha), *_vectors(group, state))
    delta, unread = _with_bias_difference(delta, group, state)
    return dict(_split(_swapped(delta) if group.place.swap else delta, group)), unread


# ------------------------------------------------------------------------------------- (up, down) and scale, by kind
def _lora(group: Group, state: State, fit: Fit) -> tuple[Factors, float | None]:
    up, down = (weight(state, group.keys[part], group.keys.get(f"{part}_scale")) for part in ("up", "down"))
    if "mid" in group.keys:
        down = _folded(weight(state, group.keys["mid"]), down, group)
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
        raise Misfit(f"{group.keys['up']}: expected (N, r) for a down of {tuple(down.shape)}, got {tuple(up.shape)}")
    return (up, down), _scale(group, state, down.shape[0])


def _folded(mid: Tensor, down: Tensor, group: Group) -> Tensor:
    """LoCon's third factor, (r, r, kh, kw) between a down and an up of 1×1: Σ_j mid[i, j] · down[j]."""
    if mid.ndim != 4 or mid.shape[1] != down.shape[0]:
        raise Misfit(f"{group.keys['mid']}: expected (r, {down.shape[0]}, kh, kw), got {tuple(mid.shape)}")
    return torch.einsum("ijhw,jc->ichw", mid.float(), down.flatten(1).float())


def _loha(group: Group, state: State, fit: Fit) -> tuple[Factors, float | None]:
    factors, rank = lycoris.loha(_parts(group, state, "hada_"), group.shape, group.name, fit)
    return factors, _scale(group, state, rank)


def _lokr(group: Group, state: State, fit: Fit) -> tuple[Factors, float | None]:
    factors, rank = lycoris.lokr(_parts(group, state, "lokr_"), group.shape, group.name, fit)
    return factors, None if rank is None else _scale(group, state, rank)


def _full(group: Group, state: State, fit: Fit) -> tuple[Factors, float | None]:
    return lycoris.full(weight(state, group.keys["diff"]), group.shape, group.name, fit), None


_READERS: Mapping[str, Callable] = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "diff": _full}


def _parts(group: Group, state: State, prefix: str) -> dict[str, Tensor]:
    parts = {part: weight(state, key) for part, key in group.keys.items() if part.startswith(prefix)}
    for part, tensor in parts.items():
        if tensor.ndim < 2:
            raise Misfit(f"{group.keys[part]}: expected a matrix, got {tuple(tensor.shape)}")
    return parts


def _scale(group: Group, state: State, rank: int) -> float | None:
    """alpha/r of the file; None where it gives no alpha, which means 1."""
    return number(state, group.keys["alpha"]) / rank if "alpha" in group.keys else None


# ------------------------------------------------------------------------------------------------------------- shapes
def _as_down(down: Tensor, group: Group) -> Tensor:
    """(r, *the weight's shape after its rows); 1×1 convolutions are written with those two axes or without."""
    shape = group.shape[1:]
    if tuple(down.shape[1:]) == shape:
        return down
    if down[0].numel() != prod(shape) or (group.kind == "LoRA" and down.shape[1] != shape[0]):
        raise Misfit(f"{group.keys.get('down', group.name)}: expected (r, {', '.join(map(str, shape))}) for "
                     f"{group.name}, got {tuple(down.shape)}")
    return down.reshape(down.shape[0], *shape)


def _as_up(up: Tensor, group: Group) -> Tensor:
    shape = (group.shape[0], up.shape[1]) + (1,) * (len(group.shape) - 2)
    if tuple(up.shape) == shape:
        return up
    if up.numel() != prod(shape):
        raise Misfit(f"{group.keys.get('up', group.name)}: expected ({group.shape[0]}, {up.shape[1]}) for "
                     f"{group.name}, got {tuple(up.shape)}")
    return up.reshape(shape)


def _vectors(group: Group, state: State) -> tuple[Tensor | None, Tensor | None]:
    """(bias, magnitude), each (N) or None."""
    bias = _vector(group, state, "bias")
    if {"magnitude", "dora_scale"} <= set(group.keys):
        raise NunchakuError(f"{group.keys['magnitude']} and {group.keys['dora_scale']} are for the same thing")
    if "dora_scale" in group.keys:
        _check_rows(state[group.keys["dora_scale"]].shape, group)
    return bias, _vector(group, state, "dora_scale" if "dora_scale" in group.keys else "magnitude")


def _vector(group: Group, state: State, part: str) -> Tensor | None:
    if part not in group.keys:
        return None
    tensor = weight(state, group.keys[part])
    if tensor.numel() != group.shape[0]:
        raise Misfit(f"{group.keys[part]}: expected ({group.shape[0]},) for {group.name}, got {tuple(tensor.shape)}")
    return tensor.flatten()


def _check_rows(shape: torch.Size, group: Group) -> None:
    """(1, K) is what LyCORIS writes where the norms are those of columns."""
    rows, columns = group.shape[:2]
    if len(shape) > 1 and shape[0] == 1 != rows and shape[1] == columns:
        raise NunchakuError(f"{group.keys['dora_scale']}: {tuple(shape)} is DoRA by columns (inputs) of the weight; "
                            "only DoRA by rows (outputs) can be read")


# -------------------------------------------------------------------------------------------------------------- bias
def _with_bias_difference(delta: Delta, group: Group, state: State) -> tuple[Delta, list[str]]:
    """`diff_b` is added as it is, and a Delta's bias times alpha/r: the two agree to the bit for powers of two."""
    key = group.keys.get("diff_b")
    if key is None:
        return delta, []
    if delta.bias is not None:
        raise NunchakuError(f"{key} and {group.keys['bias']} are for the same thing")
    difference, scale = _vector(group, state, "diff_b"), delta.alpha / delta.rank
    if scale == 0 or math.frexp(scale)[0] != 0.5:
        return delta, [key]
    return replace(delta, bias=difference / scale), []


# -------------------------------------------------------------------------------------------------------------- rows
def _swapped(delta: Delta) -> Delta:
    def swap(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat(tensor.chunk(2)[::-1])

    return replace(delta, up=swap(delta.up), bias=swap(delta.bias), magnitude=swap(delta.magnitude))


def _split(delta: Delta, group: Group) -> Iterator[tuple[str, Delta]]:
    """Each module's rows of up, over all of down, or over the rows of down that they use."""
    modules, sizes = group.place.modules, group.sizes
    if len(modules) == 1:
        yield modules[0], delta
        return
    ups = delta.up.split(sizes)
    vectors = [[None] * len(sizes) if v is None else v.split(sizes) for v in (delta.bias, delta.magnitude)]
    whole = [(0, delta.rank)] * len(sizes)
    # DoRA and biases change a module whose rows of up are zero
    columns = _used_columns(ups, delta.rank) if delta.bias is delta.magnitude is None else whole
    for module, up, bias, magnitude, (start, stop) in zip(modules, ups, *vectors, columns, strict=True):
        if start == 0 and stop == delta.rank:
            yield module, replace(delta, up=up, bias=bias, magnitude=magnitude)
        elif start < stop:
            alpha = delta.alpha * (stop - start) / delta.rank
            yield module, Delta(delta.down[start:stop], up[:, start:stop].contiguous(), alpha)


def _used_columns(ups: tuple[Tensor, ...], rank: int) -> list[tuple[int, int]]:
    """Where separate LoRAs were joined to one, up is zero but for a block per module: (start, stop) of each. Equal
    blocks are taken as they were joined, zeros included; otherwise blocks must at least not overlap."""
    used = [(up.flatten(1) != 0).any(0).nonzero() for up in ups]
    bounds = [(int(places.min()), int(places.max()) + 1) if places.numel() else (0, 0) for places in used]
    if rank % len(ups) == 0:
        width = rank // len(ups)
        equal = [(width * n, width * (n + 1)) for n in range(len(ups))]
        if all(start == stop or (first <= start and stop <= last)
               for (start, stop), (first, last) in zip(bounds, equal, strict=True)):
            return equal
    taken = sorted(bound for bound in bounds if bound != (0, 0))
    disjoint = all(before[1] <= after[0] for before, after in pairwise(taken))
    return bounds if disjoint and taken else [(0, rank)] * len(ups)
