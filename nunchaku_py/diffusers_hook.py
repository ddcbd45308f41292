"""Our quantizer as diffusers knows one: from_pretrained reads our files or quantizes while loading.

diffusers has no registration call: this module enters its two classes into the tables itself.
"""
from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from .checkpoint.manifest import QUANT_METHOD, manifest_of
from .checkpoint.validate import check_keys, check_loaded, check_safetensors, check_state, split_parameter
from .configuration import ConfigFields
from .errors import NunchakuError
from .linear import QuantizedSite
from .split_linear import SplitLinear


class SVDQuantConfig(ConfigFields, QuantizationConfigMixin):
    """`FluxTransformer2DModel.from_pretrained(folder, quantization_config=SVDQuantConfig(...))`, data-free."""


class SVDQuantizer(DiffusersQuantizer):
    """Builds empty quantized linears before loading and fills them, or quantizes 16-bit linears as they arrive."""

    is_serializable, is_trainable, is_compileable = True, False, True
    use_keep_in_fp32_modules = True  # diffusers looks for the attribute: Wan's fp32 modules stay fp32
    supports_parallel_loading = False  # a group's weights are gathered, in order

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._keys: list[str] | None = None
        self._source = "checkpoint"
        self._stream: Any = None
        self._dtype: torch.dtype | None = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        stored = self.quantization_config.model_dtype
        if stored and not isinstance(getattr(torch, str(stored), None), torch.dtype):
            raise NunchakuError(f"quantization_config: model_dtype {stored!r} is not a dtype of torch")
        self._dtype = getattr(torch, stored) if torch_dtype is None and stored else torch_dtype
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._keys, self._source = list(loaded_keys), str(checkpoint_files[0])
        check_safetensors(checkpoint_files if self.quantization_config.is_stored else ())
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, state_dict: Any = None, **kwargs: Any) -> None:
        if not self.quantization_config.is_stored:
            from .quantize import StreamingQuantizer

            self._stream = StreamingQuantizer(model, self.quantization_config, self._dtype)
            return
        keys = list(state_dict) if state_dict is not None else self._keys
        self.quantization_config.manifest().install(model, keys, self._source)
        if keys is not None:
            check_keys(model, keys, self._source)

    def get_state_dict_and_metadata(self, state_dict: dict[str, Any], safe_serialization: bool = False
                                    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What save_pretrained is about to write."""
        check_state(state_dict)
        return state_dict, {}

    def check_if_quantized_param(self, model: nn.Module, param_value: Any, param_name: str, state_dict: Any,
                                 **kwargs: Any) -> bool:
        if self._stream is not None:
            return self._stream.wants(param_name)
        return _stored_site(model, param_name) is not None

    def check_quantized_param_shape(self, param_name: str, current: torch.Tensor, loaded: torch.Tensor) -> bool:
        raise NunchakuError(f"{self._source}: {param_name}: expected {tuple(current.shape)}, got {tuple(loaded.shape)}")

    def create_quantized_param(self, model: nn.Module, param_value: torch.Tensor, param_name: str, target_device: Any,
                               state_dict: Any = None, unexpected_keys: Any = None, dtype: Any = None,
                               **kwargs: Any) -> None:
        if self._stream is not None:
            self._stream.put(param_name, param_value.to(target_device))
            return
        raw = param_value if state_dict is None else state_dict[param_name]  # diffusers has cast param_value
        module, leaf = _stored_site(model, param_name)
        module.set_tensor(leaf, raw.to(target_device), f"{self._source}: {param_name}")
        if dtype is not None and isinstance(module, QuantizedSite):
            module.compute_dtype = dtype

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._stream is not None:
            report = self._stream.finish()
            self._stream = None
            attach_config(model, self.quantization_config, report)
        check_loaded(model, self._source, self.quantization_config.mode)
        return model


def _stored_site(model: nn.Module, parameter: str) -> tuple[Any, str] | None:
    module, leaf = split_parameter(model, parameter)
    return (module, leaf) if isinstance(module, QuantizedSite | SplitLinear) else None


def attach_config(model: nn.Module, config: ConfigFields, report: Any) -> None:
    """Make a model whose linears were swapped in place a quantized model in diffusers' eyes: it saves and reloads."""
    config.describe(manifest_of(model, report.recipe, report.groups, report.summary()), report.model_dtype)
    mark_quantized(model, config)


def mark_quantized(model: nn.Module, config: ConfigFields) -> None:
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = SVDQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method


def detach(model: nn.Module) -> None:
    """Undo `attach_config`: the model is an ordinary 16-bit one again."""
    for name in ("hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model, "register_to_config"):
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(config)


auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SVDQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SVDQuantConfig

from . import lite_hook  # noqa: E402, F401  (last: it builds on what is above, and enters itself as well)
