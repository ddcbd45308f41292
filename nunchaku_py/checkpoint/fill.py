"""Putting the tensors of a file into the empty model that its config describes."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import NunchakuError
from ..linear import COMPUTE_DTYPES, QuantizedSite
from ..module_tools import dtype_name
from ..split_linear import SplitLinear
from .build import one_line
from .validate import split_parameter


def put(model: nn.Module, key: str, tensor: torch.Tensor, dtype: torch.dtype | None, source: str) -> None:
    """One tensor, by its name in the model; dtype: what others than those of quantized linears are cast to."""
    module, leaf = split_parameter(model, key)
    if isinstance(module, QuantizedSite | SplitLinear):
        module.set_tensor(leaf, tensor, f"{source}: {key}")
        return
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise NunchakuError(f"{source}: {key}: expected {tuple(old.shape)}, got {tuple(tensor.shape)}")
    if old.is_floating_point() != tensor.is_floating_point():
        raise NunchakuError(f"{source}: {key}: expected {dtype_name(old.dtype)}, got {dtype_name(tensor.dtype)}")
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """What quantized linears compute in, where another type is asked for than they are stored in."""
    for module in model.modules():
        if isinstance(module, QuantizedSite) and dtype in COMPUTE_DTYPES:
            module.compute_dtype = dtype


def attach_stored(model: nn.Module, quantization: dict[str, Any], source: str) -> None:
    """Make it a quantized model in the eyes of diffusers or transformers: it saves and reloads."""
    from ..diffusers_hook import SVDQuantConfig, mark_quantized
    from ..transformers_hook import TextSVDQuantConfig, mark_text_quantized

    diffusers_like = hasattr(model, "register_to_config")
    try:
        config = (SVDQuantConfig if diffusers_like else TextSVDQuantConfig).from_dict(quantization)
    except (TypeError, ValueError) as error:
        raise NunchakuError(f"{source}: quantization_config: {one_line(error)}") from error
    (mark_quantized if diffusers_like else mark_text_quantized)(model, config)
