"""Tensors that are not read yet. What torch is asked to do with one is recorded, for its shape and type are known, and
done when the result is wanted: of a file then only those rows are read that the result is made of.

So a function that converts a whole state dict runs at once on any model, and its result is had tensor by tensor."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import NunchakuError

_aten = torch.ops.aten
Read = Callable[[str, tuple[int, int] | None], Tensor]


class Op:
    """One call of an operator: func(*args, **kwargs), lazy tensors among the arguments. Compared by identity."""

    def __init__(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs


class Made(NamedTuple):
    """The result of an operator, or that of its results which has this index."""

    op: Op
    index: int | None


class Rows(NamedTuple):
    """Rows of a tensor in a file, from `start` up to `stop`; None: one without axes."""

    name: str
    start: int
    stop: int | None


class LazyTensor(Tensor):
    """`origin`: the name of a tensor that can be read, or what it is made by."""

    meta: Tensor
    origin: str | Made

    @staticmethod
    def __new__(cls, meta: Tensor, origin: str | Made) -> LazyTensor:
        self = Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device="cpu")
        self.meta, self.origin = meta, origin
        return self

    def __repr__(self) -> str:
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or func in (_aten._local_scalar_dense.default, _aten.equal.default):
            raise NunchakuError(f"{func} needs or changes numbers, which are not read yet")
        meta_args, meta_kwargs = tree_map(_on_meta, (args, kwargs))
        if isinstance(kwargs.get("device"), torch.device):
            meta_kwargs["device"] = torch.device("meta")
        metas, op = func(*meta_args, **meta_kwargs), Op(func, args, kwargs)
        if isinstance(metas, Tensor):
            return LazyTensor(metas, Made(op, None))
        return [LazyTensor(meta, Made(op, i)) for i, meta in enumerate(metas)]


def lazy(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(torch.empty(shape, dtype=dtype, device="meta"), name)


def _on_meta(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.meta
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def names_in(tensor: LazyTensor) -> Iterator[str]:
    """Of all that is read for it."""
    if isinstance(tensor.origin, str):
        yield tensor.origin
        return
    op = tensor.origin.op
    for part in tree_leaves((op.args, op.kwargs)):
        if isinstance(part, LazyTensor):
            yield from names_in(part)


# ----------------------------------------------------------------------------------------------------------- evaluation
def evaluate(tensor: LazyTensor, read: Read) -> Tensor:
    """The tensor, contiguous and in memory of its own."""
    found = _value(tensor, read, {})
    if found.is_contiguous() and found.untyped_storage().nbytes() == found.nbytes:
        return found
    return found.clone(memory_format=torch.contiguous_format)


def _value(tensor: LazyTensor, read: Read, done: dict[Op, Any]) -> Tensor:
    rows = _rows(tensor)
    if rows is not None:
        whole = rows.stop is None or isinstance(tensor.origin, str)
        return read(rows.name, None if whole else (rows.start, rows.stop))
    op, index = tensor.origin
    if op not in done:
        args, kwargs = tree_map(lambda part: _value(part, read, done) if isinstance(part, LazyTensor) else part,
                                (op.args, op.kwargs))
        done[op] = op.func(*args, **kwargs)
    return done[op] if index is None else done[op][index]


def _rows(tensor: LazyTensor) -> Rows | None:
    """Where it lies in a file, if it is a tensor of one, or rows of it."""
    if isinstance(tensor.origin, str):
        return Rows(tensor.origin, 0, tensor.shape[0] if tensor.ndim else None)
    (op, index), start = tensor.origin, None
    if op.func is _aten.split.Tensor and _axis(op, 2) == 0:
        start = index * op.args[1]
    elif op.func is _aten.split_with_sizes.default and _axis(op, 2) == 0:
        start = [0, *accumulate(op.args[1])][index]
    elif op.func is _aten.slice.Tensor and _axis(op, 1) == 0 and (op.args[4:] or (1,))[0] == 1:
        start = _first_row(op)
    outer = None if start is None else _rows(op.args[0])
    return None if outer is None else Rows(outer.name, outer.start + start, outer.start + start + tensor.shape[0])


def _axis(op: Op, place: int) -> int:
    axis = op.args[place] if len(op.args) > place else op.kwargs.get("dim", 0)
    return axis % op.args[0].ndim


def _first_row(op: Op) -> int:
    count, start = op.args[0].shape[0], (op.args[2:] or (None,))[0] or 0
    return min(max(start + count if start < 0 else start, 0), count)
