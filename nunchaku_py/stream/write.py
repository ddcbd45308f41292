"""A streamed run's result on disk, the same bytes as if the model had been quantized in memory and saved."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.own import single_metadata, without_origin
from ..checkpoint.tensor_file import Layout, layout_of, write_tensors
from ..progress import Progress
from .run import StreamedRun

SHARD = 10 * 10**9  # bytes; the default of diffusers


class Tensors:
    """All tensors of a finished run under the names that its model saves them with, read one at a time."""

    def __init__(self, run: StreamedRun) -> None:
        self.home, self.made = run.residence, run.finished.open(run.blocks)
        self.state = run.model.state_dict(keep_vars=True)
        self.layout = layout_of({name: tensor for name, tensor in self.state.items()
                                 if name not in self.home.aliases})

    def read(self, name: str) -> torch.Tensor:
        if name in self.made.tensors:
            return self.made.read(name)
        if self.home.stored(name) in self.home.weights.tensors:
            return self.home.read(name)
        return self.state[name].detach().cpu()  # computed, and in no file

    def nbytes(self, name: str) -> int:
        shape, dtype = self.layout[name]
        return torch.Size(shape).numel() * dtype.itemsize


def write_file(run: StreamedRun, path: Path) -> None:
    """One safetensors file with the config in its metadata."""
    tensors = Tensors(run)
    _write(tensors, path, list(tensors.layout), single_metadata(run.model, run.residence.aliases))


def write_folder(run: StreamedRun, folder: Path) -> None:
    """A model folder of diffusers or transformers: config.json, and one safetensors file or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(run.model, folder)
    tensors = Tensors(run)
    shards = list(_shards(tensors))
    stem = "diffusion_pytorch_model" if hasattr(run.model, "register_to_config") else "model"
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, members in zip(names, shards, strict=True):
        _write(tensors, folder / file, members, {"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": sum(map(tensors.nbytes, where))}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write(tensors: Tensors, path: Path, names: Iterable[str], metadata: dict[str, str]) -> None:
    layout: Layout = {name: tensors.layout[name] for name in names}
    with Progress(sum(map(tensors.nbytes, layout)), "writing") as bar:

        def each() -> Iterator[tuple[str, torch.Tensor]]:
            for name in layout:
                yield name, tensors.read(name)
                bar.advance(tensors.nbytes(name))

        write_tensors(path, layout, each(), metadata)


def _shards(tensors: Tensors) -> Iterator[list[str]]:
    """In the model's order, each as many as stay within the size of a shard."""
    held, size = [], 0
    for name in tensors.layout:
        more = tensors.nbytes(name)
        if held and size + more > SHARD:
            yield held
            held, size = [], 0
        held.append(name)
        size += more
    yield held


def _write_config(model: Any, folder: Path) -> None:
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    without_origin(folder)
