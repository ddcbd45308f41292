"""The 16-bit weights of one model, read one tensor at a time: what every kind of source is opened as."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint.headers import TensorHeader, shown
from ..checkpoint.tensor_file import TensorFile
from ..checkpoint.validate import some
from ..errors import NunchakuError
from ..folders import read_json

FLOATS = ("BF16", "F16", "F32")
_INDEX = ".safetensors.index.json"
_USUAL = ("diffusion_pytorch_model", "model")


class Weights(Protocol):
    """The 16-bit tensors of one model, by the names diffusers gives them, read one at a time.

    label: for sentences, the file or folder. notes: sentences on what is left out. tensors: what can be read."""

    label: str
    notes: tuple[str, ...]
    tensors: Mapping[str, TensorHeader]

    def read(self, name: str) -> torch.Tensor:
        """In memory of its own, on the CPU."""
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """Tensors that can be read by rows, too, under whatever names a file gives them."""

    label: str
    tensors: Mapping[str, TensorHeader]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor: ...

    def close(self) -> None: ...


class FolderWeights:
    """A model folder of diffusers or transformers: one safetensors file, or shards with their index."""

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._file = _opened(Path(folder))
        self.tensors: Mapping[str, TensorHeader] = self._file.tensors
        self.metadata = self._file.metadata

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return self._file.read(name, rows)

    def close(self) -> None:
        self._file.close()


def _opened(folder: Path) -> TensorFile:
    indices, files = sorted(folder.glob(f"*{_INDEX}")), sorted(folder.glob("*.safetensors"))
    for stem in _USUAL:  # what the libraries read unasked; beside it may lie variants, such as model.fp16.safetensors
        if (folder / f"{stem}{_INDEX}") in indices:
            return _sharded(folder, folder / f"{stem}{_INDEX}")
        if (folder / f"{stem}.safetensors") in files:
            return TensorFile(folder / f"{stem}.safetensors")
    if len(indices) == 1 and all(_is_shard_of(indices[0], file) for file in files):
        return _sharded(folder, indices[0])
    if len(files) == 1 and not indices:
        return TensorFile(files[0])
    if not files and not indices:
        pickles = next(folder.glob("*.bin"), None)
        raise NunchakuError(f"{folder}: holds no safetensors file" + (
            f", and {pickles.name} is a pickle, which can run code when it is read; save the model as safetensors"
            if pickles else ""))
    raise NunchakuError(f"{folder}: expected one safetensors file, or shards with one index, found "
                        f"{some([file.name for file in (*indices, *files)])}: which of them is the model?")


def _is_shard_of(index: Path, file: Path) -> bool:
    return file.name.startswith(f"{index.name.removesuffix(_INDEX)}-")


def _sharded(folder: Path, index: Path) -> TensorFile:
    """Index and shards must name the same tensors."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise NunchakuError(f"{index}: expected a weight_map of tensor names and file names")
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise NunchakuError(f"{index}: names the shard {shown(name)}, which is not there")
    file = TensorFile([folder / name for name in sorted(set(places.values()))])
    for name, shard in places.items():
        if name not in file or file.path_of(name).name != shard:
            raise NunchakuError(f"{folder / shard}: holds no tensor {shown(name)}, which {index.name} says it does")
    more = [name for name in file.names() if name not in places]
    if more:
        raise NunchakuError(f"{index}: does not name {len(more)} tensors of its shards: {some(more)}")
    return file
