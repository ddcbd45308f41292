"""A reader's checks: keys, shapes, finite scales. Each refusal is a sentence that names the file and the tensor."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..errors import NunchakuError
from ..linear import QuantizedSite
from ..split_linear import SplitLinear
from ..swap import prepare
from .headers import read_header, shown
from .mapping import release

_MUST_BE_FINITE = ("scales", "zeros", "channel_scale", "smooth", "down", "up", "bias", "divisor")
_SHOWN = 3
_ALIGNMENT = 64  # bytes; what torch allocates on a CPU


def split_parameter(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """(module that owns the parameter, its leaf name); the module is None where the path does not exist."""
    parent, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(parent), leaf
    except AttributeError:
        return None, leaf


def check_keys(model: nn.Module, keys: Iterable[str], source: str) -> None:
    """Refuse missing and unexpected tensors, as far as the model itself does not allow them."""
    expected, found = set(model.state_dict()), set(keys)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unexpected = sorted(key for key in found - expected if not any(re.search(pattern, key) for pattern in ignored))
    missing = sorted(expected - found)
    if missing:
        raise NunchakuError(f"{source}: {len(missing)} tensors are missing: {some(missing)}")
    if unexpected:
        raise NunchakuError(f"{source}: {len(unexpected)} tensors are unexpected: {some(unexpected)}")


def check_loaded(model: nn.Module, source: str, mode: str = "auto") -> None:
    """After loading: nothing is left on the meta device, what the ops divide or multiply by is finite; then pack,
    unless there is a GPU that the model will be moved to first. Of a mapped file one site at a time is in memory."""
    empty = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if empty:
        raise NunchakuError(f"{source}: {len(empty)} tensors are missing: {some(empty)}")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedSite):
            check_finite(module, f"{source}: {name}")
            module.set_mode(mode, now=module.codes.is_cuda or not torch.cuda.is_available())
            release(module.parameters(recurse=False))
        elif isinstance(module, SplitLinear) and module.bias is not None:
            _check_finite(module.bias, f"{source}: {name}.bias")
    prepare(model)
    _align(model)
    release(model.parameters())


def check_state(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse to write a file that could not be read back: with adapters in it, or with tensors that are elsewhere."""
    for name, tensor in state.items():
        if ".base_layer." in name:
            raise NunchakuError(f"{name}: the linear carries an adapter (LoRA); unload it before saving the model")
        if ".processor." in name:
            raise NunchakuError(f"{name}: belongs to an IP-Adapter; unload it before saving the model")
        if tensor.is_meta:
            raise NunchakuError(f"{name}: has no data here (meta device); load the model, or remove its offloading")


def _align(model: nn.Module) -> None:
    """Copy 16- and 32-bit tensors that lie unaligned in a memory-mapped file: CPU matrix products of the same numbers
    differ in the last bit by alignment, and a loaded model must give the bits of the one that was saved."""
    for module in model.modules():
        if isinstance(module, QuantizedSite):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()


def check_finite(site: QuantizedSite, label: str) -> None:
    for leaf in _MUST_BE_FINITE:
        _check_finite(site._parameters.get(leaf), f"{label}.{leaf}")
    if site.site.has_smooth and not (site.smooth > 0).all():
        raise NunchakuError(f"{label}.smooth: must be positive")
    if site.site.divided and not site.divisor.all():
        raise NunchakuError(f"{label}.divisor: must not be zero")


def _check_finite(tensor: torch.Tensor | None, label: str) -> None:
    if tensor is not None and not torch.isfinite(tensor.float()).all():
        raise NunchakuError(f"{label}: holds NaN or infinite values")


def check_safetensors(files: Iterable[str | Path]) -> None:
    """A quantized model is never unpickled."""
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise NunchakuError(f"{file}: is no safetensors file, and quantized models are read from nothing else")


def stored_keys(path: str | Path) -> list[str]:
    """The tensor names of a safetensors file; a truncated or corrupted one is refused before anything is built."""
    return list(read_header(path).tensors)


def some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
