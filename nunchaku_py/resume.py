"""Finished blocks of an unfinished quantization, kept on disk so that the same command goes on where it was stopped."""
from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .calibrate import State
from .checkpoint.headers import read_header
from .checkpoint.manifest import entry_from_json, entry_to_json
from .checkpoint.own import write_then_rename
from .checkpoint.tensor_file import TensorFile, layout_of, write_tensors
from .errors import NunchakuError
from .report import SiteRow
from .swap import Entry, Quantized, empty_module, entry_of, fill_module, quantized_sites

_SETTINGS = "unfinished.json"
Finished = tuple[dict[str, Quantized], list[SiteRow]]


class FinishedBlocks:
    """One safetensors file per finished block: its tensors, its report rows, and the checksums of these tensors and of
    its 16-bit weights."""

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._open(json.dumps(settings, sort_keys=True, default=str))

    def _open(self, settings: str) -> None:
        known = self.folder / _SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not known.exists():
                write_then_rename(known, lambda to: to.write_text(settings))
            elif known.read_text() != settings:
                raise NunchakuError(f"{self.folder}: holds the unfinished work of another quantization "
                                    f"(other recipe, options or model); delete it or name another folder")
        except OSError as error:
            raise NunchakuError(f"{self.folder}: cannot be written: {error}") from error

    def has(self, block: str) -> bool:
        """Whether the block is there, whole; one cut short by a crash is removed, to be done again."""
        path = self._path(block)
        try:
            return {"weights", "tensors"} <= set(read_header(path).metadata)
        except NunchakuError:
            path.unlink(missing_ok=True)
            return False

    def read(self, block: str, originals: Mapping[str, nn.Module], dtype: torch.dtype) -> Finished | None:
        """The modules and rows of a finished block, or None. A block of other weights is refused."""
        path = self._path(block)
        if not self.has(block):
            return None
        with TensorFile(path) as file:
            meta, tensors = file.metadata, {key: file.read(key) for key in file.names()}
        if meta["tensors"] != checksum(tensors):
            path.unlink()  # what it holds is not what was written
            return None
        if meta["weights"] != checksum(_parameters(originals)):
            raise NunchakuError(f"{path}: was made from other weights than {block} has now; delete {self.folder}")
        entries = {name: entry_from_json(entry) for name, entry in json.loads(meta["sites"]).items()}
        modules = {name: _restore(name, originals[name], entries[name], tensors, dtype) for name in entries}
        rows = [SiteRow(**{**row, "k_range": tuple(row["k_range"]) if row["k_range"] else None})
                for row in json.loads(meta["rows"])]
        return modules, rows

    def write(self, block: str, originals: Mapping[str, nn.Module], finished: Finished) -> None:
        modules, rows = finished
        path = self._path(block)
        partial = path.with_suffix(".partial")
        tensors = {f"{name}.{key}": tensor.contiguous().cpu()
                   for name, module in modules.items() for key, tensor in module.state_dict().items()}
        meta = {"weights": checksum(_parameters(originals)), "tensors": checksum(tensors),
                "rows": json.dumps([asdict(row) for row in rows]),
                "sites": json.dumps({name: entry_to_json(entry_of(module)) for name, module in modules.items()})}
        try:
            write_tensors(partial, layout_of(tensors), tensors.items(), meta)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise NunchakuError(f"{path}: cannot be written: {error}") from error

    def open(self, blocks: Iterable[str]) -> TensorFile:
        """The tensors of all these blocks, under their names in the model."""
        return TensorFile(map(self._path, blocks))

    def delete(self, blocks: Iterable[str]) -> None:
        """Remove what this run wrote, and the folder if nothing else is in it."""
        for file in [*map(self._path, blocks), self.folder / _SETTINGS]:
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, block: str) -> Path:
        digest = hashlib.sha256(block.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', block)}-{digest}.safetensors"


def _restore(name: str, old: nn.Module, entry: Entry, tensors: Mapping[str, torch.Tensor],
             dtype: torch.dtype) -> Quantized:
    device = old.weight.device
    own = {key.removeprefix(f"{name}."): tensor.to(device) for key, tensor in tensors.items()
           if key.startswith(f"{name}.")}
    module = empty_module(old, entry, "bias" in own, dtype)
    fill_module(module, own, name)
    for site in quantized_sites(module):
        site.compute_dtype = old.weight.dtype
    return module


def fingerprint(states: Sequence[State]) -> str:
    """Of everything the calibration forwards are called with."""
    crc = 0
    for leaf in tree_leaves([(state.args, state.kwargs) for state in states]):
        if isinstance(leaf, torch.Tensor):
            crc = _crc(leaf, crc)
        else:
            crc = zlib.crc32(repr(leaf).encode(), crc)
    return f"{len(states)} states, {crc:08x}"


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The 16-bit weights and biases of `modules`."""
    return {f"{name}.{leaf}": parameter for name, module in modules.items()
            for leaf, parameter in module.named_parameters()}


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and bytes, whatever their order."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = _crc(tensor, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _crc(tensor: torch.Tensor, before: int) -> int:
    """Of the bytes. An expanded tensor of one element counts as contiguous, but has no stride to view its bytes by."""
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return zlib.crc32(flat.view(torch.uint8).numpy(), before) if flat.numel() else before
