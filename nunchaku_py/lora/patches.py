"""diffusers' own LoRA calls on quantized models. A file is loaded by `loading`; what a call changes in all layers is
written once, at its end; layers that are taken off leave nothing behind. Pipelines and models without quantized linears
are none of our business."""
from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..module_tools import adapted_layers, restate
from .branch import at_once
from .keep import keep
from .loading import inside, is_quantized, load_into_model, load_into_pipeline, models_of, tuner_layers

_KEPT = "nunchaku_py_before_fusing"


def attach_models(module: ModuleType) -> None:
    """After the import of diffusers.loaders.peft."""
    import diffusers.utils

    mixin = module.PeftAdapterMixin
    mixin.load_lora_adapter = _around(mixin.load_lora_adapter, load_into_model)
    mixin.fuse_lora, mixin.unfuse_lora = _fusing(mixin.fuse_lora), _unfusing(mixin.unfuse_lora)
    mixin.save_lora_adapter = _saving(mixin.save_lora_adapter)
    for name in ("set_adapters", "set_adapter", "enable_lora", "disable_lora", "enable_adapters", "disable_adapters",
                 "delete_adapters", "fuse_lora", "unfuse_lora", "unload_lora"):
        setattr(mixin, name, _at_once(getattr(mixin, name)))
    diffusers.utils.recurse_remove_peft_layers = _removing(diffusers.utils.recurse_remove_peft_layers)


def attach_pipelines(module: ModuleType) -> None:
    """After the import of diffusers.loaders.lora_pipeline."""
    from diffusers.loaders import lora_base

    if not hasattr(lora_base.recurse_remove_peft_layers, "__wrapped__"):  # imported before it was wrapped in utils
        lora_base.recurse_remove_peft_layers = _removing(lora_base.recurse_remove_peft_layers)
    for mixin in [one for one in vars(module).values() if isinstance(one, type)]:
        if "load_lora_weights" in vars(mixin):
            mixin.load_lora_weights = _around(mixin.load_lora_weights, load_into_pipeline)
    flux = module.FluxLoraLoaderMixin
    flux._maybe_expand_lora_state_dict = classmethod(_expanding(flux._maybe_expand_lora_state_dict.__func__))


def _around(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """The method, unless it is called on something quantized, and not by one of these calls."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = "pretrained_model_name_or_path_or_dict" in kwargs
        if inside.get() or not (args or named) or not any(map(is_quantized, models_of(self).values())):
            return original(self, *args, **kwargs)
        if named:
            args = (kwargs.pop("pretrained_model_name_or_path_or_dict"), *args)
        return ours(original, self, *args, **kwargs)

    return method


def _at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which calls one layer after another; what they fold is written at its end."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        with at_once():
            return original(*args, **kwargs)

    return method


def _fusing(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT adds adapters to the weights of layers in 16 bit, and takes them off with another rounding: those of
    quantized models are kept, so that unfusing is exact in them, too."""

    @functools.wraps(original)
    def fuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_quantized(self):
            for layer in adapted_layers(self):  # all or none
                layer.check_fusable(kwargs.get("adapter_names"), kwargs.get("safe_fusing", False))
            for layer in _dense_layers(self):
                if not layer.merged:
                    kept = {name: tensor.detach().clone() for name, tensor in layer.base_layer.named_parameters()}
                    vars(layer)[_KEPT] = kept
        return original(self, *args, **kwargs)

    return fuse


def _unfusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unfuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for layer in _dense_layers(self):
            for name, tensor in vars(layer).pop(_KEPT, {}).items():
                layer.base_layer.get_parameter(name).data.copy_(tensor)
        return found

    return unfuse


def _dense_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers around linears and convolutions in 16 bit."""
    ours = set(adapted_layers(model))
    return [layer for layer in tuner_layers(model) if layer not in ours]


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers casts the model before, to no dtype where none is asked for, which quantized models refuse."""

    @functools.wraps(original)
    def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_quantized(self):
            return original(self, *args, **kwargs)
        vars(self)["to"] = lambda *_, **__: self
        try:
            return original(self, *args, **kwargs)
        finally:
            del vars(self)["to"]

    return save


def _removing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Before diffusers takes PEFT's layers off: what they folded into linears goes, unless it was fused."""

    @functools.wraps(original)
    def remove(model: nn.Module) -> Any:
        layers = adapted_layers(model)
        fused = [site for layer in layers if layer.merged for site in layer.sites() if site.adapters]
        keep(fused)
        for layer in layers:
            layer.taken_off()
        found = original(model)
        if fused:
            restate(model)
        return found

    return remove


def _expanding(original: Callable[..., Any]) -> Callable[..., Any]:
    """FLUX's loader looks weights up by name, to widen LoRAs: of quantized linears there are none, nor the need."""

    @functools.wraps(original)
    def expand(cls: type, transformer: nn.Module, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        modules = dict(transformer.named_modules())
        prefix = f"{cls.transformer_name}."
        ours = {key: value for key, value in lora_state_dict.items()
                if _is_ours(modules.get(key.removeprefix(prefix).split(".lora_")[0]))}
        others = {key: value for key, value in lora_state_dict.items() if key not in ours}
        return {**(original(cls, transformer, others) if others else {}), **ours}

    return expand


def _is_ours(module: nn.Module | None) -> bool:
    return getattr(getattr(module, "base_layer", module), "is_nunchaku_quantized", False)
