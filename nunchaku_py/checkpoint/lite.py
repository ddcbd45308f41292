"""The tensors of a nunchaku_lite folder as ours, one state dict after the other.

    W4A4   qweight int8 (N, K/2) · wscales (K/g, N) · smooth_factor (K) · proj_down (K, R) · proj_up (N, R) · bias (N)
           nvfp4: wcscales (N) · wtscale (1)           packed as Nunchaku's, without padding: N and K are whole tiles
    W4A16  qweight int32 (N/4, K/2) · wscales, wzeros (K/64, N) · bias (N)

Nothing is shifted, and modulations are in diffusers' order, without 1 added to their scales."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import NunchakuError
from ..module_tools import dtype_name
from ..site import Site
from ..swap import Entry, empty_module, replace_module
from .headers import read_header
from .lite_config import Description, Target
from .nunchaku import packing
from .nunchaku.layouts import AWQ_COLUMNS, AWQ_ROWS, CHANNELS
from .nunchaku.linears import AWQ_GROUP, FLOATS, HALVES
from .tensor_file import DTYPES
from .validate import some

# Leaf in the file → ours.
LEAVES = {"w4a4": {"qweight": "codes", "wscales": "scales", "smooth_factor": "smooth", "proj_down": "down",
                   "proj_up": "up", "wcscales": "channel_scale", "wtscale": "channel_scale", "bias": "bias"},
          "w4a16": {"qweight": "codes", "wscales": "scales", "wzeros": "zeros", "bias": "bias"}}
_BRANCH, _SECOND = ("proj_down", "proj_up"), ("wcscales", "wtscale")


class LiteReader:
    """keys: all names of the folder; dtype: 16 bit, in which its tensors are. `install` comes before `converted`."""

    def __init__(self, description: Description, keys: Iterable[str], source: str, dtype: torch.dtype) -> None:
        self.description, self.source, self.dtype = description, source, dtype
        self._keys = set(keys)
        self._targets = {target.name: target for target in description.targets}
        self._made_of: dict[str, list[str]] = {}  # our name → names in the file, which may lie in several shards
        self._place: dict[str, tuple[Target, str, str]] = {}  # name in the file → target, its leaf, our name
        for target in description.targets:
            self._places(target)
        self._shapes: dict[str, tuple[int, int]] = {}  # target → (n, k)
        self._waiting: dict[str, dict[str, Tensor]] = {}

    def _places(self, target: Target) -> None:
        for leaf in self._leaves(target):
            key = f"{target.name}.{leaf}"
            if key not in self._keys:
                continue
            ours = LEAVES[target.kind][leaf]
            name = f"{target.module if ours == 'bias' else target.prefix}.{ours}"
            self._place[key] = target, leaf, name
            if leaf not in _BRANCH or self._rank(target):
                self._made_of.setdefault(name, []).append(key)

    def _leaves(self, target: Target) -> list[str]:
        second = target.kind == "w4a4" and self.description.format == "nvfp4"
        return [leaf for leaf in LEAVES[target.kind] if second or leaf not in _SECOND]

    def _rank(self, target: Target) -> int:
        return min(self.description.ranks.get(target.name, self.description.rank), self.description.rank)

    @property
    def names(self) -> list[str]:
        """What the tensors are called once they are ours."""
        return [*self._made_of, *(key for key in sorted(self._keys) if key not in self._place)]

    # ----------------------------------------------------------------------------------------------- empty modules
    def install(self, model: nn.Module) -> None:
        """Put empty quantized linears into the model, once it is known that all their tensors are there."""
        modules: dict[str, list[Target]] = {}
        for target in self.description.targets:
            modules.setdefault(target.module, []).append(target)
        self._check_splits(model, modules)
        linears = {name: self._linear(model, targets[0]) for name, targets in modules.items()}
        entries = {name: self._entry(linears[name], sorted(targets, key=lambda target: target.part or 0))
                   for name, targets in modules.items()}
        self._check_tensors(modules, linears)
        for name, entry in entries.items():
            old = linears[name]
            replace_module(model, name, empty_module(old, entry, old.bias is not None, self.dtype))

    def _check_splits(self, model: nn.Module, modules: Mapping[str, Sequence[Target]]) -> None:
        for name, module in model.named_modules():
            if self.description.split_of(name) and isinstance(module, nn.Linear):
                if not any(target.part is not None for target in modules.get(name, ())):
                    raise NunchakuError(f"{self.source}: {name} is held in parts, of which none is a target; only "
                                        "quantized linears are read so")

    def _linear(self, model: nn.Module, target: Target) -> nn.Linear:
        try:
            module = model.get_submodule(target.module)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            raise NunchakuError(f"{self.source}: target {target.name!r}: {type(model).__name__} has no linear "
                                f"{target.module}")
        return module

    def _entry(self, old: nn.Linear, targets: Sequence[Target]) -> Entry:
        n, k = old.out_features, old.in_features
        if targets[0].part is None and len(targets) == 1:
            return self._site(targets[0], n, k)
        ranges = self._ranges(targets, n, k)
        return tuple((part, self._site(target, n, part[1] - part[0]))
                     for part, target in zip(ranges, targets, strict=True))

    def _ranges(self, targets: Sequence[Target], n: int, k: int) -> list[tuple[int, int]]:
        name = targets[0].module
        ranges = self.description.split_of(name).ranges(n, k)
        if ranges is None:
            raise NunchakuError(f"{self.source}: patches: {name}, a linear of {k} inputs and {n} outputs, cannot be "
                                "cut as split_linear says")
        if [target.part for target in targets] != list(range(len(ranges))):
            raise NunchakuError(f"{self.source}: {name} is held in {len(ranges)} parts, and the targets name "
                                f"{', '.join(target.name for target in targets)}; only linears that are quantized "
                                "whole are read")
        return ranges

    def _site(self, target: Target, n: int, k: int) -> Site:
        rows, columns = (CHANNELS, CHANNELS) if target.kind == "w4a4" else (AWQ_ROWS, AWQ_COLUMNS)
        if n % rows or k % columns:
            raise NunchakuError(f"{self.source}: target {target.name!r}: has {k} inputs and {n} outputs; such files "
                                f"hold multiples of {columns} and of {rows} in {target.kind}")
        self._shapes[target.name] = n, k
        if target.kind == "w4a16":
            return Site("w4a16", "uint4", AWQ_GROUP)
        return Site("w4a4", self.description.format, self.description.group, self._rank(target))

    def _check_tensors(self, modules: Mapping[str, Sequence[Target]], linears: Mapping[str, nn.Linear]) -> None:
        """Refuse by the names that the file has; what else is missing or unexpected, the model's names tell."""
        missing: list[str] = []
        for name, targets in modules.items():
            for target in targets:
                missing += [key for key in map(f"{target.name}.{{}}".format, self._needed(target))
                            if key not in self._keys]
            biases = [f"{target.name}.bias" for target in targets]
            found = [key for key in biases if key in self._keys]
            if linears[name].bias is not None and not found:
                missing.append(biases[-1])
            if linears[name].bias is None and found:
                raise NunchakuError(f"{self.source}: {found[0]} is unexpected: the model's linear has no bias")
        if missing:
            raise NunchakuError(f"{self.source}: {len(missing)} tensors are missing: {some(missing)}")

    def _needed(self, target: Target) -> list[str]:
        """Leaves that must be there, bias aside; of the two second scales one does."""
        needed = [leaf for leaf in self._leaves(target) if leaf != "bias" and leaf not in _SECOND]
        if target.kind == "w4a4" and not self.description.rank:
            needed = [leaf for leaf in needed if leaf not in _BRANCH]
        second = target.kind == "w4a4" and self.description.format == "nvfp4"
        if second and not any(f"{target.name}.{leaf}" in self._keys for leaf in _SECOND):
            needed.append(_SECOND[0])
        return needed

    # ---------------------------------------------------------------------------------------------------- tensors
    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors out of the folder's, by name; what is made of several waits until the last of them came."""
        out: dict[str, Tensor] = {}
        for key, tensor in state.items():
            if key not in self._place:
                out[key] = tensor
                continue
            target, leaf, name = self._place[key]
            value = self._rows(key, target, leaf, tensor)
            if name not in self._made_of:
                continue
            pieces = self._waiting.setdefault(name, {})
            pieces[key] = value
            if len(pieces) == len(self._made_of[name]):
                found = [pieces[key] for key in self._made_of[name]]
                out[name] = _joined(found, target, leaf, self._shapes[target.name][0])
                del self._waiting[name]
        return out

    def _rows(self, key: str, target: Target, leaf: str, tensor: Tensor) -> Tensor:
        """A tensor of the file in rows."""
        shape, dtypes = self._expected(target, leaf)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            names = " or ".join(map(dtype_name, dtypes))
            raise NunchakuError(f"{self.source}: {key}: expected {shape} {names}, "
                                f"got {tuple(tensor.shape)} {dtype_name(tensor.dtype)}")
        n, k = self._shapes[target.name]
        if leaf == "qweight":
            unpack = packing.unpack_codes if target.kind == "w4a4" else packing.unpack_awq_codes
            return unpack(tensor, n, k)
        if leaf in _SECOND:
            return tensor.float() if leaf == "wtscale" else packing.unpack_vector(tensor.float(), n)
        if leaf == "bias":
            return packing.unpack_vector(tensor, n) if target.kind == "w4a4" else tensor
        tensor = tensor if tensor.dtype == torch.float8_e4m3fn else self._in_16_bit(key, tensor)
        if target.kind == "w4a16":
            return packing.unpack_awq_scales(tensor, n, k // AWQ_GROUP)
        if leaf == "wscales":
            return packing.unpack_scales(tensor, n, k // self.description.group)
        if leaf == "smooth_factor":
            return packing.unpack_vector(tensor, k)
        return self._branch(key, target, leaf, tensor, (n, k))

    def _expected(self, target: Target, leaf: str) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
        n, k = self._shapes[target.name]
        if target.kind == "w4a16":
            return {"qweight": ((n // 4, k // 2), (torch.int32,)),
                    "bias": ((n,), FLOATS)}.get(leaf, ((k // AWQ_GROUP, n), FLOATS))
        rank, group = self.description.rank, self.description.group
        scales = FLOATS if self.description.format == "int4" else (torch.float8_e4m3fn,)
        return {"qweight": ((n, k // 2), (torch.int8,)), "wscales": ((k // group, n), scales),
                "smooth_factor": ((k,), FLOATS), "proj_down": ((k, rank), FLOATS), "proj_up": ((n, rank), FLOATS),
                "wcscales": ((n,), FLOATS), "wtscale": ((1,), FLOATS), "bias": ((n,), FLOATS)}[leaf]

    def _in_16_bit(self, key: str, tensor: Tensor) -> Tensor:
        out = tensor.to(self.dtype)
        if tensor.dtype != self.dtype and not torch.equal(out.float(), tensor.float()):
            raise NunchakuError(f"{self.source}: {key}: is {dtype_name(tensor.dtype)} among tensors in "
                                f"{dtype_name(self.dtype)}, which cannot hold what is in it")
        return out

    def _branch(self, key: str, target: Target, leaf: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        n, k = shape
        full, rank = self.description.rank, self._rank(target)
        if not full:
            return tensor
        down = leaf == "proj_down"
        factor = packing.unpack_down(tensor, k, full) if down else packing.unpack_up(tensor, n, full)
        kept, rest = factor.split([rank, full - rank], 0 if down else 1)
        if rest.any():
            raise NunchakuError(f"{self.source}: {key}: has more than the rank {rank} that the configuration says")
        return kept.contiguous()


def _joined(pieces: Sequence[Tensor], target: Target, leaf: str, n: int) -> Tensor:
    """The two factors of a second scale; or the biases of a linear's parts, of which there is mostly one."""
    if leaf in _SECOND:
        return prod(pieces, start=torch.ones(n))
    return pieces[0] if len(pieces) == 1 else sum(piece.float() for piece in pieces)


def file_dtype(description: Description, files: Iterable[str], otherwise: torch.dtype) -> torch.dtype:
    """The 16-bit type of a folder's quantized tensors, as the headers of its files say."""
    wanted = {f"{target.name}.{'smooth_factor' if target.kind == 'w4a4' else 'wscales'}"
              for target in description.targets}
    for path in files:
        for name, tensor in read_header(Path(path)).tensors.items():
            if name in wanted and DTYPES.get(tensor.dtype) in HALVES:
                return DTYPES[tensor.dtype]
    return otherwise if otherwise in HALVES else torch.bfloat16
