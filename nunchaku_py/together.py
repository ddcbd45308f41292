"""Linears that read one input, run together: the input is quantized once, the modules stay separate.

An attention processor that knows which projections share an input hands diffusers' own processor an `AttentionView`,
in which these projections already have their results.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .linear import QuantLinear, wants_gradient
from .precision import as_autocast


def apply_together(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """y of each module for one input x, which is quantized once where they share smooth factors and `down`."""
    x = as_autocast(x)
    if not share_input(modules) or wants_gradient(x):
        return tuple(module(x) for module in modules)
    rows = x.reshape(-1, modules[0].in_features)
    quantized = modules[0].quantize_input(rows)
    return tuple(module.multiply(quantized, rows.dtype).reshape(*x.shape[:-1], module.out_features)
                 for module in modules)


def share_input(modules: Sequence[nn.Module]) -> bool:
    """Whether one quantized input serves all: the same smooth factors, `down` and activation format, and nothing hooked
    onto or wrapped around a member (offloading, adapters), which wants to see its call."""
    if not all(type(module) is QuantLinear and module.site.has_smooth and not _is_hooked(module) for module in modules):
        return False
    for module in modules:
        module.ensure_packed()
    return len({module.input_key for module in modules}) == 1


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks or hasattr(module, "_hf_hook")
                or hasattr(module, "_diffusers_hook"))


class AttentionView:
    """An attention module as a processor sees it, with some projections computed beforehand."""

    def __init__(self, attention: nn.Module, inputs: Sequence[tuple[Tensor, Sequence[str]]]) -> None:
        self._attention, self._results = attention, {}
        for x, names in inputs:
            modules = [getattr(attention, name) for name in names]
            self._results.update(zip(names, map(_Result, apply_together(modules, x)), strict=True))

    def __getattr__(self, name: str) -> Any:
        results = self.__dict__["_results"]
        return results[name] if name in results else getattr(self.__dict__["_attention"], name)


class _Result:
    """Stands for a projection whose output is there already."""

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y
