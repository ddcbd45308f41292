"""Whatever holds the 16-bit weights of a model: its folder, one safetensors file, or a GGUF file."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import NunchakuError
from ..folders import read_json
from . import gguf
from .fp8 import in_16_bit
from .single_file import check_16_bit, open_single_file
from .weights import FolderWeights, Weights

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def open_source(path: Path, config: Path | None = None) -> tuple[dict[str, Any], Weights]:
    """(config, weights), of which nothing is read yet. config: for files, the folder of a model of the same kind."""
    path = Path(path)
    if path.is_dir():
        if config is not None:
            raise NunchakuError(f"{path}: is a folder, which has a config of its own; --config is for files")
        return _open_folder(path)
    if not path.is_file():
        raise NunchakuError(f"{path}: no such file or folder")
    if path.suffix.lower() in _PICKLES:
        raise NunchakuError(f"{path}: is a pickle, which can run code when it is read; save its tensors as safetensors")
    return gguf.open_gguf(path, config) if gguf.is_gguf(path) else open_single_file(path, config)


def _open_folder(path: Path) -> tuple[dict[str, Any], Weights]:
    if (path / "model_index.json").is_file():
        raise NunchakuError(f"{path}: is a pipeline; name the folder of one of its models, such as {path}/transformer")
    if not (path / "config.json").is_file():
        raise NunchakuError(f"{path}: holds no config.json, so it is no model's folder")
    config = read_json(path / "config.json")
    if config.get("quantization_config"):
        raise NunchakuError(f"{path}: is already quantized; quantizing needs the 16-bit weights that it was made from")
    weights = FolderWeights(path)
    check_16_bit(weights.label, weights.tensors)
    return config, in_16_bit(weights, weights.metadata)
