"""A model whose weights lie in files: what is computed has them in memory, everything else is empty."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..checkpoint.validate import some, split_parameter
from ..errors import NunchakuError
from ..linear import QuantizedSite
from ..residence import Residence
from .heap import give_back
from .weights import FLOATS, Weights


class Streamed(Residence):
    """Within it (`with`) all that lies outside the blocks has its weights; within `of(name)` that block has, too.

    model: on the meta device, in the dtypes that its weights are to have. renamed: name in the model → name in the
    files, where they differ."""

    def __init__(self, model: nn.Module, blocks: Iterable[str], weights: Weights, device: torch.device | str = "cpu",
                 renamed: Mapping[str, str] | None = None) -> None:
        self.model, self.weights, self.device = model, weights, torch.device(device)
        self.blocks, self.renamed, self.guests = list(blocks), renamed or {}, []
        self.aliases = tied(model)
        self.names = self._names()
        check_complete(self)

    def _names(self) -> dict[str, list[str]]:
        """Block, or "" for what lies outside them → the tensors that its files hold, under the model's names."""
        inside = {f"{block}.": block for block in self.blocks}
        found: dict[str, list[str]] = {"": [], **{block: [] for block in self.blocks}}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.is_meta or self.stored(name) in self.weights.tensors:
                block = next((block for prefix, block in inside.items() if name.startswith(prefix)), "")
                if name not in self.aliases:
                    found[block].append(name)
        return found

    def stored(self, name: str) -> str:
        """What the files call a tensor; of tied ones they may hold any."""
        given = self.renamed.get(name, name)
        if given in self.weights.tensors:
            return given
        others = (self.renamed.get(alias, alias) for alias, first in self.aliases.items() if first == name)
        return next((other for other in others if other in self.weights.tensors), given)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as the model is to have it, on the CPU."""
        module, leaf = split_parameter(self.model, name)
        like = getattr(module, leaf)
        tensor = self.weights.read(self.stored(name))
        if tensor.shape != like.shape:
            raise NunchakuError(f"{self.weights.label}: {name}: expected {tuple(like.shape)}, "
                                f"got {tuple(tensor.shape)}")
        return tensor.to(like.dtype) if like.is_floating_point() else tensor

    def __enter__(self) -> Streamed:
        self._load(self.model, self.names[""])
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names[""]:
            _empty(self.model, name)
        for second, first in self.aliases.items():
            _share(self.model, first, second)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        here = self.model.get_submodule(name)
        before = list(here.modules())
        try:
            self._load(here, self.names[name])
            yield
        finally:
            for module in (*before, *self.model.get_submodule(name).modules(), *self.guests):
                empty(module)
            self.guests.clear()
            give_back()

    def also(self, modules: Iterable[nn.Module]) -> None:
        """Modules to be emptied with the block that is in memory: those that are to take the place of its own."""
        self.guests += [inner for module in modules for inner in module.modules()]

    def _load(self, owner: nn.Module, names: Iterable[str]) -> None:
        for name in names:
            module, leaf = split_parameter(self.model, name)
            tensor = self.read(name).to(self.device)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor
        for second, first in self.aliases.items():
            _share(self.model, first, second)
        for module in owner.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(self.device)


def tied(model: nn.Module) -> dict[str, str]:
    """Second name → first name of parameters that are one."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found[name] = known
    return found


def check_complete(streamed: Streamed) -> None:
    """Refuse files that lack a tensor of the model, or have it in another shape or as no float, before anything is
    done."""
    wanted = {name: streamed.stored(name) for names in streamed.names.values() for name in names}
    tensors = streamed.weights.tensors
    missing = [name for name, stored in wanted.items() if stored not in tensors]
    if missing:
        raise NunchakuError(f"{streamed.weights.label}: {len(missing)} tensors of {type(streamed.model).__name__} are "
                            f"missing: {some(missing)}")
    state = streamed.model.state_dict(keep_vars=True)
    for name, stored in wanted.items():
        if state[name].is_floating_point() and tensors[stored].dtype not in FLOATS:
            raise NunchakuError(f"{streamed.weights.label}: {name}: expected one of {', '.join(FLOATS)}, got "
                                f"{tensors[stored].dtype}: quantizing needs 16-bit weights")
        if tuple(state[name].shape) != tuple(tensors[stored].shape):
            raise NunchakuError(f"{streamed.weights.label}: {name}: expected {tuple(state[name].shape)}, "
                                f"got {tuple(tensors[stored].shape)}")


def empty(module: nn.Module) -> None:
    """Take the memory of a module's own tensors; those that are computed, and in no file, stay."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    if isinstance(module, QuantizedSite):
        module._unpack()


def _empty(model: nn.Module, name: str) -> None:
    module, leaf = split_parameter(model, name)
    if module is not None and module._parameters.get(leaf) is not None:
        kept = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(torch.empty_like(kept, device="meta"), requires_grad=False)


def _share(model: nn.Module, first: str, second: str) -> None:
    (source, name), (target, leaf) = split_parameter(model, first), split_parameter(model, second)
    if source is not None and target is not None and name in source._parameters:
        target._parameters[leaf] = source._parameters[name]
