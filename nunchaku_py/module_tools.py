"""What modules that stand for others need: moving without casting, filling, and whether they are being offloaded."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Berth:
    """Where nq.offload lets a module compute; away: its tensors are not there between calls of its block."""

    device: torch.device
    visit: Callable[[int, bool], None] | None = None
    number: int = 0  # of the block
    away: bool = False


def used_on(module: Any) -> torch.device:
    """Where a quantized linear computes, also while its tensors are away."""
    return module.codes.device if module.berth is None else module.berth.device


@contextmanager
def in_place(module: Any) -> Iterator[None]:
    """Within it the tensors of a quantized linear are where it computes."""
    berth = module.berth
    if berth is None or not berth.away:
        yield
        return
    berth.visit(berth.number, True)
    try:
        yield
    finally:
        berth.visit(berth.number, False)


def is_offloaded(module: nn.Module) -> bool:
    """Whether the tensors are taken away between calls, by accelerate or by us: folded weights would stay behind, or
    be too much to move."""
    if getattr(module, "berth", None) is not None:
        return True
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def seen_through(module: Any) -> Any:
    """The quantized linear inside a layer that carries adapters, where calling it is calling the layer: they are folded
    into it, and nothing is hooked onto the layer. Else the module itself."""
    look = getattr(type(module), "folded_base", None)
    return module if look is None else look(module)


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that carry adapters of quantized linears."""
    return [module for module in model.modules() if hasattr(type(module), "folded_base")]


def restate(model: nn.Module) -> None:
    """Let the config of a quantized model say what ranks its linears have now."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if hasattr(config, "describe"):
        from .checkpoint.manifest import manifest_of

        config.sites = manifest_of(model).to_json()["sites"]


def filled(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    module.weight.data.copy_(weight)
    if bias is not None:
        module.bias.data.copy_(bias)
    return module.requires_grad_(False)


def move_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn's change of device without its change of dtype."""
    probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
    return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)


def nothing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for a weight that is held otherwise. NaN, so that code which multiplies by it is noticed."""
    nan = torch.full((1,), float("nan"), dtype=dtype, device=device).expand(*shape)
    nan._is_hf_initialized = True  # transformers would draw random weights into it when a tied tensor is missing
    return nan


def data_of(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.data


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
