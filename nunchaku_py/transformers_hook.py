"""Our quantizer as transformers knows one: text encoders of a pipeline save and reload like its denoiser."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint.manifest import QUANT_METHOD, manifest_of
from .checkpoint.validate import check_loaded, stored_keys
from .configuration import ConfigFields
from .errors import NunchakuError
from .swap import quantized_modules, quantized_sites


@register_quantization_config(QUANT_METHOD)
class TextSVDQuantConfig(ConfigFields, QuantizationConfigMixin):
    """`T5EncoderModel.from_pretrained(folder, quantization_config=TextSVDQuantConfig("w4a16-int4"))`, data-free."""

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class TextSVDQuantizer(HfQuantizer):
    """Installs empty quantized modules before loading; quantizes on the fly, if asked, once the model is there."""

    is_trainable, is_compileable = False, True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None,
                                             **kwargs: Any) -> nn.Module:
        if self.quantization_config.is_stored:
            source = str(checkpoint_files[0]) if checkpoint_files else type(model).__name__
            keys = {key for file in checkpoint_files or () for key in stored_keys(file)}
            self.quantization_config.manifest().install(model, None, source)
            check_stored(model, keys, source)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.quantization_config.is_stored:
            restore_dtypes(model)
            check_loaded(model, type(model).__name__, self.quantization_config.mode)
            return model
        from .quantize import quantize

        config = self.quantization_config
        quantize(model, config.recipe, mode=config.mode, rank=config.rank, rules=config.rules)
        return model


def check_stored(model: nn.Module, keys: set[str], source: str) -> None:
    """transformers fills a missing tensor with whatever memory holds. It may add or drop a first name component."""
    for name, module in quantized_modules(model).items():
        forms = {name, name.partition(".")[2], *(key.partition(".")[0] + "." + name for key in keys)}
        own = {key[len(form) + 1:] for form in forms for key in keys if form and key.startswith(f"{form}.")}
        expected = set(module.state_dict())
        for what, leaves in (("missing", expected - own), ("unexpected", own - expected)):
            if leaves:
                raise NunchakuError(f"{source}: {name}.{min(leaves)} is {what}")


def restore_dtypes(model: nn.Module) -> None:
    """Undo the widening of modules that transformers keeps in fp32 (T5's wo): the stored bits come back exactly."""
    for site in quantized_sites(model):
        for name, (_, dtype) in site.tensor_dtypes().items():
            if name != "bias" and site._parameters[name].dtype == torch.float32 != dtype:
                site._parameters[name] = nn.Parameter(site._parameters[name].data.to(dtype), requires_grad=False)


def detach_text(model: nn.Module) -> None:
    """Undo `attach_text`."""
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = False


def attach_text(model: nn.Module, report: Any) -> None:
    """Make a text encoder whose linears were swapped in place a quantized model in transformers' eyes."""
    config = TextSVDQuantConfig()
    config.describe(manifest_of(model, report.recipe, report.groups, report.summary()), report.model_dtype)
    mark_text_quantized(model, config)


def mark_text_quantized(model: nn.Module, config: TextSVDQuantConfig) -> None:
    model.config.quantization_config = config
    model.hf_quantizer = TextSVDQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
