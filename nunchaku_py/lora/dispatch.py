"""What makes PEFT put our layers around our linears, whoever calls it: diffusers, transformers, the user. Imported with
PEFT, not before: the layers themselves, which are PEFT's, are imported when the first adapter is made."""
from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import nn

from ..module_tools import adapted_layers


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


def attach_hotswap(module: ModuleType) -> None:
    """After the import of peft.utils.hotswap, which swaps weights in a way that leaves no trace in them."""
    original = module.hotswap_adapter_from_state_dict

    @functools.wraps(original)
    def swap(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = original(model, *args, **kwargs)
        for layer in adapted_layers(model):
            layer.refresh(anew=True)
        return found

    module.hotswap_adapter_from_state_dict = swap
