"""Our quantizer as transformers knows one: text encoders of a pipeline save and reload like its denoiser."""
from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint.manifest import QUANT_METHOD, manifest_of
from .checkpoint.validate import check_loaded
from .configuration import ConfigFields


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

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.quantization_config.is_stored:
            self.quantization_config.manifest().install(model, None, type(model).__name__)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.quantization_config.is_stored:
            check_loaded(model, type(model).__name__, self.quantization_config.mode)
            return model
        from .quantize import quantize_model

        config = self.quantization_config
        quantize_model(model, config.recipe, None, config.mode, rank=config.rank, rules=config.rules)
        return model


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
    model.config.quantization_config = config
    model.hf_quantizer = TextSVDQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
