"""What makes PEFT put our layers around our linears, whoever calls it: diffusers, transformers, the user. Imported with
PEFT, not before: the layers themselves, which are PEFT's, are imported when the first adapter is made."""
from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..module_tools import adapted_layers, restate


def attach(module: ModuleType) -> None:
    """After the import of peft.tuners.lora.model."""
    original = module.LoraModel._create_new_module

    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        from .layers import LAYERS

        base = target
        while hasattr(base, "base_layer"):
            base = base.base_layer
        layer = LAYERS.get(type(base))
        if layer is None:
            return original(lora_config, adapter_name, target, **kwargs)
        return layer(target, adapter_name, config=lora_config, **kwargs)

    module.LoraModel._create_new_module = staticmethod(create)
    module.LoraModel._unload_and_optionally_merge = _restating(module.LoraModel._unload_and_optionally_merge)


def _restating(original: Callable[..., Any]) -> Callable[..., Any]:
    """What PEFT merges before it takes its layers off has become rank of the model: its config says so, for saving."""

    @functools.wraps(original)
    def unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        restate(found)
        return found

    return unload


def attach_hotswap(module: ModuleType) -> None:
    """After the import of peft.utils.hotswap, which swaps weights, and pads them before, and leaves no trace of it."""
    for name in ("hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"):
        setattr(module, name, _folding_anew(getattr(module, name)))


def _folding_anew(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def change(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(model, *args, **kwargs)
        finally:
            for layer in adapted_layers(model):
                layer.refresh(anew=True)

    return change
