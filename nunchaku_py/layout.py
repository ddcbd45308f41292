"""A memory layout is one line of data: logical axes split into factors -> the order in which the factors are stored.

    "(N p:8 i:2 g:8) (K j:2 t:4 r:8) -> N K p g t i j r"

Here row n = ((N·8 + p)·2 + i)·8 + g, and the last factor named, r, is the one whose neighbours are neighbours in
memory. A factor with a size is fixed; an upper case one, at most one per axis and its first, takes what is left.
Packing, unpacking, padding and the offset that C++ computes all come from this line.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch.nn.functional as F
from torch import Tensor

from .errors import NunchakuError

_LINE = re.compile(r"\s*(\([^()]*\)\s*)+->[\sA-Za-z]*")


@dataclass(frozen=True)
class Factor:
    name: str
    size: int | None  # None: what is left of the axis


@dataclass(frozen=True)
class Layout:
    """See the module's docstring; `line` is all there is to know."""

    line: str

    def __post_init__(self) -> None:
        if not _LINE.fullmatch(self.line):
            raise self._error("expected axes in parentheses, an arrow, and their factors in stored order")
        names = [f.name for axis in self.axes for f in axis]
        if len(set(names)) != len(names) or sorted(names) != sorted(self._stored):
            raise self._error("expected every factor once on each side of the arrow")
        free = [(place, f.name) for axis in self.axes for place, f in enumerate(axis) if f.size is None]
        if any(place or not name.isupper() for place, name in free):
            raise self._error("expected a factor without a size to be upper case and the first of its axis")

    def _error(self, sentence: str) -> NunchakuError:
        return NunchakuError(f"layout '{self.line}': {sentence}")

    @cached_property
    def axes(self) -> tuple[tuple[Factor, ...], ...]:
        """The factors of each logical axis, the slowest first."""
        words = (axis.split() for axis in re.findall(r"\(([^()]*)\)", self.line))
        return tuple(tuple(_factor(word) for word in axis) for axis in words)

    @cached_property
    def _stored(self) -> tuple[str, ...]:
        return tuple(self.line.partition("->")[2].split())

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The permutation from logical to stored factors."""
        names = [f.name for axis in self.axes for f in axis]
        return tuple(names.index(name) for name in self._stored)

    @cached_property
    def tile(self) -> tuple[int, ...]:
        """What every logical axis must be a multiple of."""
        return tuple(prod(f.size for f in axis if f.size is not None) for axis in self.axes)

    def padded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape rounded up to whole tiles."""
        self._check_rank(shape)
        return tuple(-(-size // tile) * tile for size, tile in zip(shape, self.tile, strict=True))

    def pad(self, x: Tensor, fill: float = 0) -> Tensor:
        """x grown at the end of each axis to whole tiles."""
        margins = [margin for size, whole in zip(x.shape, self.padded(x.shape), strict=True)
                   for margin in (whole - size, 0)]
        return F.pad(x, margins[::-1], value=fill)

    def pack(self, x: Tensor) -> Tensor:
        """A contiguous tensor of x's shape whose memory holds x in stored order."""
        return x.reshape(self._sizes(x.shape)).permute(self.order).reshape(x.shape).contiguous()

    def unpack(self, packed: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """What pack(pad(x)) was made from, cut to `shape`."""
        shape = tuple(packed.shape if shape is None else shape)
        whole = self.padded(shape)
        if packed.numel() != prod(whole):
            raise self._error(f"expected {prod(whole)} elements for {shape}, got {packed.numel()}")
        sizes = self._sizes(whole)
        inverse = [self.order.index(place) for place in range(len(self.order))]
        logical = packed.reshape([sizes[place] for place in self.order]).permute(inverse).reshape(whole)
        return logical[tuple(slice(size) for size in shape)].contiguous()

    def offset(self, coordinate: tuple[int, ...], shape: tuple[int, ...]) -> int:
        """Where in memory the element at a logical coordinate lies, for a padded shape."""
        sizes, digits = self._sizes(shape), []
        for position, axis, size in zip(coordinate, self.axes, shape, strict=True):
            for factor, stride in _strides(axis):
                digits.append(position // stride % (factor.size or max(size // stride, 1)))
        place = 0
        for index in self.order:
            place = place * sizes[index] + digits[index]
        return place

    def to_cpp(self, name: str, qualifiers: str = "constexpr") -> str:
        """The same as a C++ function: for axes N and K, int name(int n, int N, int k, int K), N and K padded."""
        arguments, digit, size = [], {}, {}
        for axis, tile in zip(self.axes, self.tile, strict=True):
            upper = axis[0].name.upper()
            lower = upper.lower()
            arguments.append(f"int {lower}, [[maybe_unused]] int {upper}")
            for factor, stride in _strides(axis):
                digit[factor.name] = f"{lower} / {stride}" + (f" % {factor.size}" if factor.size is not None else "")
                size[factor.name] = f"({upper} / {tile})" if factor.size is None else str(factor.size)
        place = "0"
        for factor in self._stored:
            place = f"({place}) * {size[factor]} + {digit[factor]}"
        return f"{qualifiers} int {name}({', '.join(arguments)}) {{ return {place}; }}\n"

    def _check_rank(self, shape: tuple[int, ...]) -> None:
        if len(shape) != len(self.axes):
            raise self._error(f"expected {len(self.axes)} axes, got {tuple(shape)}")

    def _sizes(self, shape: tuple[int, ...]) -> list[int]:
        """The size of every logical factor."""
        self._check_rank(shape)
        sizes: list[int] = []
        for axis, size, tile in zip(self.axes, shape, self.tile, strict=True):
            fixed = axis[0].size is not None
            if size % tile or (fixed and size != tile):
                raise self._error(f"{tuple(shape)} does not divide into tiles of {self.tile}")
            sizes += [size // tile if f.size is None else f.size for f in axis]
        return sizes


def _factor(word: str) -> Factor:
    name, _, size = word.partition(":")
    return Factor(name, int(size) if size else None)


def _strides(axis: tuple[Factor, ...]) -> Iterator[tuple[Factor, int]]:
    """Each factor with the distance, along its logical axis, between two of its values."""
    for place, factor in enumerate(axis):
        yield factor, prod(f.size or 1 for f in axis[place + 1 :])
