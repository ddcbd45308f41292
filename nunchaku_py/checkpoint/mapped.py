"""Loading a model whose weights stay in its files, mapped into memory: what a process needs beside them is little."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import NunchakuError
from ..folders import read_json
from . import own
from .manifest import QUANT_METHOD
from .nunchaku.read import is_nunchaku
from .tensor_file import TensorFile


def load_mapped(path: Path, mode: str, dtype: torch.dtype | None) -> Any:
    """A model of a file or folder, or a pipeline, of which quantized components are mapped."""
    if (path / "model_index.json").is_file():
        return _pipeline(path, mode, dtype)
    if is_nunchaku(path):
        raise _refusal(path, "is one of Nunchaku's, whose weights are packed for its kernels and unpacked on loading")
    if path.is_file():
        with TensorFile(path) as file:
            config = own.config_of(file.metadata, path)
            return own.fill_model(config, file, own.shared_of(file, path), file.view, path, mode, dtype)
    config = own.folder_config(path)
    if config["quantization_config"]["quant_method"] != QUANT_METHOD:
        raise _refusal(path, "is in the form of diffusers' nunchaku_lite, whose weights are unpacked on loading")
    with TensorFile(_shards(path)) as file:
        return own.fill_model(config, file, None, file.view, path, mode, dtype)


def _pipeline(path: Path, mode: str, dtype: torch.dtype | None) -> Any:
    mapped: dict[str, nn.Module] = {}
    for folder in sorted(file.parent for file in path.glob("*/config.json")):
        if own.quantization_in(read_json(folder / "config.json")):
            mapped[folder.name] = load_mapped(folder, mode, dtype)
    if not mapped:
        raise NunchakuError(f"{path}: none of its components is quantized, and only quantized ones are mapped")
    return own.read_pipeline(path, mode, dtype, **mapped)


def _shards(folder: Path) -> list[Path]:
    """The files that hold the model of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        names = read_json(indexes[0]).get("weight_map")
        if not isinstance(names, dict) or not set(names.values()) <= {file.name for file in files}:
            raise NunchakuError(f"{indexes[0]}: its weight_map does not name files that lie beside it")
        return [file for file in files if file.name in set(names.values())]
    if len(files) != 1:
        raise NunchakuError(f"{folder}: holds {len(files)} safetensors files and {len(indexes)} indexes of them; which "
                            "hold the model cannot be told")
    return files


def _refusal(path: Path, what: str) -> NunchakuError:
    return NunchakuError(f"{path}: {what}: it cannot be mapped; `nunchaku-py convert {path} NEW.safetensors` writes a "
                         "file that can")
