"""Files whose weights were cast to 8-bit floats, as ComfyUI's are, read as bfloat16.

A plain cast is undone exactly, for bfloat16 holds every such number. Where a file has a scale beside a weight, one for
the tensor or one for each row, the weight is its product with it, computed in fp32."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.headers import TensorHeader, shown
from ..errors import NunchakuError
from .weights import Source

STORED = ("F8_E4M3", "F8_E5M2")
MARK = "scaled_fp8"  # a tensor of this name says that all weights of 8 bit have scales
LAYERS = "_quantization_metadata"  # metadata that names the format of every layer
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_SAID = ("format", "full_precision_matrix_mult")  # of a layer; the second concerns how ComfyUI multiplies
_SCALES = ("scale_weight", "weight_scale")
_OTHERS = ("scale_input", "input_scale", "comfy_quant")  # what activations are scaled by does not concern weights


class Fp8Source:
    """A source of 8-bit floats, as one of bfloat16."""

    notes: tuple[str, ...] = ()

    def __init__(self, inner: Source, metadata: Mapping[str, str]) -> None:
        self.label, self._inner = inner.label, inner
        self._scale_of = {name: scale for name, tensor in inner.tensors.items() if tensor.dtype in STORED
                          and (scale := _scale_of(name, inner.tensors)) is not None}
        _check(inner, metadata, self._scale_of)
        companions = {*self._scale_of.values(), *_others(inner.tensors)}
        self.tensors: Mapping[str, TensorHeader] = {
            name: _widened(tensor) for name, tensor in inner.tensors.items() if name not in companions}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        tensor = self._inner.read(name, rows)
        if self._inner.tensors[name].dtype not in STORED:
            return tensor
        if name not in self._scale_of:
            return tensor.bfloat16()
        return (tensor.float() * self._scale(name, rows, tensor.ndim)).bfloat16()

    def _scale(self, name: str, rows: tuple[int, int] | None, axes: int) -> torch.Tensor:
        key = self._scale_of[name]
        scale = self._inner.read(key).float().flatten()
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise NunchakuError(f"{self.label}: {shown(key)}: expected positive scales")
        if scale.numel() == 1:
            return scale
        return scale[slice(*(rows or (None,)))].reshape(-1, *(1,) * (axes - 1))

    def close(self) -> None:
        self._inner.close()


def in_16_bit(source: Source, metadata: Mapping[str, str]) -> Source:
    """The source itself, where nothing in it is an 8-bit float or said to be of few bits."""
    small = any(tensor.dtype in STORED or name.endswith(".comfy_quant") for name, tensor in source.tensors.items())
    return Fp8Source(source, metadata) if small or LAYERS in metadata else source


def _scale_of(name: str, tensors: Mapping[str, TensorHeader]) -> str | None:
    module = name.removesuffix("weight")
    return next((module + leaf for leaf in _SCALES if module != name and module + leaf in tensors), None)


def _others(tensors: Mapping[str, TensorHeader]) -> list[str]:
    return [name for name in tensors if (leaf := name.rpartition(".")[2]) == MARK or leaf in _OTHERS]


def _widened(tensor: TensorHeader) -> TensorHeader:
    return replace(tensor, dtype="BF16", nbytes=2 * tensor.nbytes) if tensor.dtype in STORED else tensor


def _check(inner: Source, metadata: Mapping[str, str], scale_of: Mapping[str, str]) -> None:
    marked = any(name.rpartition(".")[2] == MARK for name in inner.tensors)
    known = {*scale_of.values(), *_others(inner.tensors)}
    for name, tensor in inner.tensors.items():
        label = f"{inner.label}: {shown(name)}"
        if name.endswith(".comfy_quant"):
            _check_format(bytes(inner.read(name).flatten().view(torch.uint8).tolist()), label)
        if tensor.dtype not in STORED or name in known:
            continue
        if name in scale_of:
            _check_scale(inner.tensors[scale_of[name]], tensor, f"{inner.label}: {shown(scale_of[name])}")
        elif marked and name.endswith(".weight") and len(tensor.shape) > 1:
            raise NunchakuError(f"{label}: has no scale, and the file says that its 8-bit weights have one")
        foreign = next((other for leaf in ("_scale_inv", "_scale_2", "_scales", "_scale")
                        if (other := name + leaf) in inner.tensors and other not in known), None)
        if foreign is not None:
            raise NunchakuError(f"{label}: is scaled by {shown(foreign)}, in a way that this release does not know")
    _check_layers(inner.label, metadata.get(LAYERS))


def _check_scale(scale: TensorHeader, weight: TensorHeader, label: str) -> None:
    count = math.prod(scale.shape)
    if scale.dtype not in ("F32", "BF16", "F16") or count != 1 and (
            count != weight.shape[0] or scale.shape[0] != count):
        raise NunchakuError(f"{label}: expected one scale, or one for each of {weight.shape[0]} rows, "
                            f"got {scale.shape} {scale.dtype}")


def _check_layers(label: str, text: str | None) -> None:
    if text is None:
        return
    try:
        layers = list(json.loads(text)["layers"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NunchakuError(f"{label}: {LAYERS} in its metadata cannot be understood") from error
    for layer in layers:
        _check_layer(layer, label)


def _check_format(text: bytes, label: str) -> None:
    try:
        _check_layer(json.loads(text.decode("utf-8")), label)
    except ValueError as error:
        if isinstance(error, NunchakuError):
            raise
        raise NunchakuError(f"{label}: expected a JSON object with a format") from error


def _check_layer(said: Any, label: str) -> None:
    """Anything that is said beyond the format may be a rotation or blocks, which would be read as wrong numbers."""
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise NunchakuError(f"{label}: expected a JSON object with a format")
    more = sorted(key for key, value in said.items() if key not in _SAID and value)
    if said["format"] not in _FORMATS or more:
        how = f"{shown(said['format'])} with {shown(more[0])}" if more else shown(said["format"])
        raise NunchakuError(f"{label}: says that weights are quantized as {how}; quantizing needs 16-bit weights, or "
                            "8-bit floats")
