"""diffusers' `nunchaku_lite` folders on our kernels: a quantizer beside diffusers' own, and who is asked when."""
from __future__ import annotations

from collections.abc import MutableMapping
from enum import Enum
from functools import partial
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import constants
from torch import nn

from .checkpoint.lite import LiteReader, file_dtype
from .checkpoint.lite_config import DTYPES, OWN, QUANT_METHOD, Description
from .checkpoint.manifest import manifest_of
from .checkpoint.validate import check_keys, check_loaded, check_safetensors
from .diffusers_hook import SVDQuantConfig, SVDQuantizer, mark_quantized
from .errors import NunchakuError
from .lite_choice import why_ours
from .module_tools import dtype_name

_FIELDS = ("compute_dtype", "svdq_w4a4", "awq_w4a16", "patches", OWN)
_UNTRUSTED = ("its kernels are remote code, which it may not run: the environment variable "
              "DIFFUSERS_TRUST_REMOTE_KERNELS is not set")


class _Method(str, Enum):  # diffusers reads `quant_method.value`
    NUNCHAKU_LITE = QUANT_METHOD


class OwnLiteConfig(QuantizationConfigMixin):
    """The configuration, for a diffusers that knows none."""

    def __init__(self, compute_dtype: Any = None, svdq_w4a4: Any = None, awq_w4a16: Any = None, **kwargs: Any) -> None:
        self.quant_method = _Method.NUNCHAKU_LITE
        dtype = "bfloat16" if compute_dtype is None else compute_dtype
        self.compute_dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        self.svdq_w4a4, self.awq_w4a16 = svdq_w4a4, awq_w4a16
        Description.from_json(fields_of(self), type(self).__name__)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, **fields_of(self)}


class _Keeping:
    """Keeps what diffusers' class leaves out, as it may change what the tensors mean."""

    def __init__(self, compute_dtype: Any = None, svdq_w4a4: Any = None, awq_w4a16: Any = None, patches: Any = None,
                 **kwargs: Any) -> None:
        super().__init__(compute_dtype, svdq_w4a4, awq_w4a16, patches=patches, **kwargs)
        self.patches = patches
        setattr(self, OWN, kwargs.get(OWN))

    def __repr__(self) -> str:  # diffusers' own asks for a method that its class has not
        return f"{type(self).__name__}({', '.join(fields_of(self))})"


class _AlsoTheirs(type):
    """Takes configurations of the class that it stands for in diffusers' table as its own: pipelines look there
    whether they know what a user made with diffusers' class."""

    def __instancecheck__(cls, found: Any) -> bool:
        return super().__instancecheck__(found) or isinstance(found, cls.__bases__[-1])


def fields_of(config: Any) -> dict[str, Any]:
    """JSON values."""
    found = {name: getattr(config, name, None) for name in _FIELDS}
    dtype = found["compute_dtype"]
    found["compute_dtype"] = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    return {name: value for name, value in found.items() if value is not None}


class LiteQuantizer(SVDQuantizer):
    """Reads a nunchaku_lite folder; the model is one of ours then, and saves as such. why: not diffusers' own."""

    def __init__(self, quantization_config: Any, why: str = "", **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.why = why
        self._description = Description.from_json(fields_of(quantization_config), "config.json")
        self._reader: LiteReader | None = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = self._description.dtype if torch_dtype is None else torch_dtype
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._source = str(checkpoint_files[0])
        check_safetensors(checkpoint_files)
        dtype = file_dtype(self._description, checkpoint_files, self._description.dtype)
        self._reader = LiteReader(self._description, loaded_keys, self._source, dtype)
        return self._reader.names

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._reader.converted(state_dict)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._reader.install(model)
        check_keys(model, self._reader.names, self._source)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._reader = self._description = None
        config = SVDQuantConfig()
        check_loaded(model, self._source, config.mode)
        config.describe(manifest_of(model, "imported", (), {"source": {"format": QUANT_METHOD}}), self._dtype)
        mark_quantized(model, config)
        self.quantization_config = config
        return model


# ------------------------------------------------------------------------------------------------------- who is asked
def refusal(theirs: Any, config: Any) -> str | None:
    """Why diffusers would not load such a model here, in its own words where it has some."""
    if theirs is None:
        return "it knows no such models"
    try:
        theirs(config, pre_quantized=True).validate_environment()
    except Exception as error:  # whatever it trips over here, it would trip over when loading
        return str(error) or type(error).__name__
    if not getattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True):
        return _UNTRUSTED
    return None


def _unknown_patches(their_config: Any, config: Any) -> str | None:
    """diffusers' class drops what it does not know, and would then miss the modules that patches make."""
    if not getattr(config, "patches", None) or their_config is None:
        return None
    if hasattr(their_config.from_dict(fields_of(config)), "patches"):
        return None
    return "the folder has patches, which it does not know"


def choose(theirs: Any, their_config: Any, config: Any, **kwargs: Any) -> Any:
    """The quantizer for a model: stands in diffusers' table where a class would."""
    why = why_ours(lambda: refusal(theirs, config) or _unknown_patches(their_config, config))
    if why is not None:
        return LiteQuantizer(config, why, **kwargs)
    if theirs is None:
        raise NunchakuError("nunchaku_lite: this diffusers knows no such models, and ours are not wanted: "
                            "nq.set_nunchaku_lite('auto') takes them")
    return theirs(config, **kwargs)


def enter(quantizers: MutableMapping[str, Any], configs: MutableMapping[str, Any]) -> type:
    """Into diffusers' two tables, in front of its own; gives the class of configurations."""
    theirs, their_config = quantizers.get(QUANT_METHOD), configs.get(QUANT_METHOD)
    configs[QUANT_METHOD] = found = _AlsoTheirs("NunchakuLiteConfig", (_Keeping, their_config or OwnLiteConfig), {})
    quantizers[QUANT_METHOD] = partial(choose, theirs, their_config)
    return found


# By its name, so that a model of diffusers' own quantizer can still be pickled.
NunchakuLiteConfig = enter(auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
