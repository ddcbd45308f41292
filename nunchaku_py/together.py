"""Linears that read one input quantize it once; the modules stay separate, which adapters and offloading address.

The module that holds them (attention, a gated feed-forward) runs its own forward, and its own attention processor, on
a `View` of itself, whose linears notice that they are given the very same tensor.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fusion import Fusion, class_path, is_hooked, own_forward, why_not_installed
from .gradient import wants_gradient
from .input_key import InputKey
from .linear import QuantizedInput, QuantLinear
from .module_tools import seen_through
from .precision import as_autocast


class Seen(NamedTuple):
    """A tensor, the input_key of the site that read it, what it became, and its version then."""

    tensor: Tensor
    key: InputKey
    quantized: QuantizedInput
    version: int


def _version(x: Tensor) -> int:
    """By which a change in place is noticed. Inference tensors count none, and a graph must not depend on it."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class View:
    """A module as its forward sees it: linears called on one tensor share its quantized form.

    instead: what stands for some attributes of the module.
    """

    def __init__(self, module: nn.Module, **instead: Any) -> None:
        self.__dict__.update(_module=module, _seen=[], _instead=instead)

    def __getattr__(self, name: str) -> Any:
        instead = self.__dict__["_instead"]
        if name in instead:
            return instead[name]
        value = seen_through(getattr(self.__dict__["_module"], name))
        return _Sharing(value, self.__dict__["_seen"]) if type(value) is QuantLinear else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


class _Sharing:
    """A linear that looks first whether its input has been quantized the same way."""

    def __init__(self, linear: QuantLinear, seen: list[Seen]) -> None:
        self._linear, self._seen = linear, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_linear"], name)

    def __call__(self, x: Tensor) -> Tensor:
        linear = self._linear
        if is_hooked(linear) or not linear.site.has_smooth or x.shape[-1] != linear.in_features or wants_gradient(x):
            return linear(x)
        cast = as_autocast(x)
        linear.ensure_packed(cast.dtype)
        return linear.multiply(self._quantized(x, cast), cast.dtype).reshape(*x.shape[:-1], linear.out_features)

    def _quantized(self, x: Tensor, cast: Tensor) -> QuantizedInput:
        key = self._linear.input_key
        for tensor, other, quantized, version in self._seen:
            if tensor is x and other is key and version == _version(x):
                return quantized
        quantized = self._linear.quantize_input(cast.reshape(-1, x.shape[-1]))
        # The last is enough: projections of one input are called in a row.
        self._seen[:] = [Seen(x, key, quantized, _version(x))]
        return quantized


def shared_input(linears: Sequence[nn.Module], dtype: torch.dtype | None = None) -> bool:
    """Whether one quantized input serves all, in rows of this dtype or of the last one, and nothing hooked onto or
    wrapped around one wants to see its call."""
    linears = [seen_through(linear) for linear in linears]
    if not all(map(_can_share, linears)):
        return False
    first, *others = _keys(linears, dtype)
    return all(key is first for key in others)


def _can_share(linear: nn.Module) -> bool:
    return type(linear) is QuantLinear and linear.site.has_smooth and not is_hooked(linear)


def _keys(linears: Sequence[QuantLinear], dtype: torch.dtype | None = None) -> list[InputKey | None]:
    for linear in linears:
        linear.ensure_packed(dtype)
    return [linear.input_key for linear in linears]


def concerns(module: nn.Module) -> bool:
    """Two linears of as many inputs in a module of diffusers' own, whose forward runs on something that is not the
    module itself (super() would not)."""
    if not class_path(module).startswith("diffusers.") or _calls_super(type(module).forward):
        return False
    children = map(seen_through, module.children())
    wide = [child.in_features for child in children if type(child) is QuantLinear and child.site.has_smooth]
    return len(set(wide)) < len(wide)


def _calls_super(function: Callable[..., Any]) -> bool:
    return "__class__" in inspect.unwrap(function).__code__.co_freevars


def refuses(module: nn.Module) -> str | None:
    """Why every linear of this module quantizes its input for itself, or None."""
    processor = getattr(module, "processor", None)
    if processor is not None and not class_path(processor).startswith("diffusers."):
        return why_not_installed(module) or f"its attention processor {class_path(processor)} is not diffusers' own"
    linears = [child for child in map(seen_through, module.children()) if _can_share(child)]
    keys = _keys(linears)
    alike = any(key is other for i, key in enumerate(keys) for other in keys[:i])
    return why_not_installed(module) or (None if alike else "no two linears without hooks read their input alike")


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return own_forward(module)(module if refuses(module) else View(module), *args, **kwargs)


SHARED_INPUTS = Fusion("one quantized input for linears that share it", concerns, refuses, forward)
