"""Adapters that run beside a divided linear (see division.py), as they do in training and where they are DoRA.

Their factors stay those of the original model, which PEFT trains and saves; hooks give the first its input back, and
divide what the second gives. So every way that PEFT calls them is right.
"""
from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .branch import present


def run_beside(linear: nn.Module, down: nn.Module, up: nn.Module) -> None:
    """Let an adapter's two modules stand beside the linear, as far as it is divided."""
    sides = {site.site.divided for site in _parts(linear)}
    if "input" in sides and not _has(down._forward_pre_hooks, _Input):
        down.register_forward_pre_hook(_Input(linear))
    if "output" in sides and not _has(up._forward_hooks, _Output):
        up.register_forward_hook(_Output(linear))


class _Hook:
    """It knows the linear weakly, which holds adapters that hold it; when they are copied it is made anew around the
    copy."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = weakref.ref(linear)

    def __reduce__(self) -> tuple:
        return type(self), (self._linear(),)

    def divisor(self, side: str, half: nn.Module, device: torch.device) -> Tensor:
        """Of all channels, in fp32, to be broadcast over what the half reads or gives."""
        sites = _parts(self._linear())
        with present(sites):
            divisors = [site.divisor.data.to(device).float() if site.site.divided == side
                        else torch.ones(site.rows_in, device=device) for site in sites]
        whole = torch.cat(divisors)
        return whole[:, None, None] if isinstance(half, nn.Conv2d) else whole


class _Input(_Hook):
    def __call__(self, half: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x.float() * self.divisor("input", half, x.device)).to(x.dtype), *inputs[1:]


class _Output(_Hook):
    def __call__(self, half: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return (y.float() / self.divisor("output", half, y.device)).to(y.dtype)


def _has(hooks: Mapping[int, Any], kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in hooks.values())


def _parts(linear: Any) -> list[Any]:
    return list(getattr(linear, "parts", (linear,)))
