"""LoRAs of any format in the weights themselves, before these are quantized: what is read is the sum.

    W' = W + Σ s·up·down                            s = strength·alpha/r, in fp32, rounded once to the weight's type
    DoRA: instead of s·up·down, m/‖V‖·V − W         V = W + s·up·down, m the norms that its rows are to have

LoHa, LoKr and full differences count with all their rank. Only what changes the tensor at hand is worked out."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.build import empty_model
from ..checkpoint.headers import TensorHeader
from ..checkpoint.tensor_file import TensorFile
from ..errors import NunchakuError
from ..lora.assemble import Group, assemble
from ..lora.delta import Delta, Target, some
from ..lora.formats import check_shapes, equal, find
from ..lora.loading import TEXT, target_of, with_metadata_alphas
from ..lora.lycoris import Fit, Misfit
from .weights import Weights

_METADATA = "lora_adapter_metadata"  # where diffusers writes alphas and the like
_ANY_RANK = 2**62


class Lora:
    """One file, at a strength, for the model `target`. modules: those it changes; with_bias: those among them whose
    bias it changes; notes: what of the file was used, and what was not."""

    def __init__(self, path: Path, strength: float, target: Target) -> None:
        self.path, self.strength = path, strength
        if not math.isfinite(strength):
            raise NunchakuError(f"{path}: expected a finite strength, got {strength}")
        self.with_bias: set[str] = set()
        state = _tensors(path)
        try:
            found = find(state, {"unet" if "UNet" in target.cls else "transformer": target})
            self._state = found.state
            self._group_of, left = self._checked(found.groups)
            self.notes = self._told(found.format, sorted({*found.unread, *left}), target.cls)
        except NunchakuError as error:
            raise NunchakuError(f"{path}: {error}") from error
        self.modules = tuple(self._group_of)

    def delta(self, module: str, leaf: str) -> Delta | None:
        """What changes this parameter of a module: its weight or its bias."""
        changed = module in self._group_of and (leaf == "weight" or leaf == "bias" and module in self.with_bias)
        return self._assembled(self._group_of[module])[0][module] if changed else None

    def _assembled(self, group: Group) -> tuple[dict[str, Delta], list[str]]:
        return assemble(group, self._state, Fit(_ANY_RANK, 0.0))

    def _checked(self, groups: Sequence[Group]) -> tuple[dict[str, Group], list[str]]:
        """(module → what changes it, keys that are left); everything is worked out once, and only that is kept."""
        group_of: dict[str, Group] = {}
        misfits, left = [], []
        for group in groups:
            try:
                deltas, unread = self._assembled(group)
            except Misfit as misfit:
                misfits.append(str(misfit))
                continue
            left += unread
            for module, delta in deltas.items():
                other = group_of.setdefault(module, group)
                if other is not group and not equal(self._assembled(other)[0][module], delta):
                    raise NunchakuError(f"{module}: changed twice, by {some(sorted(other.keys.values()))} and by "
                                        f"{some(sorted(group.keys.values()))}")
                if delta.bias is not None:
                    self.with_bias.add(module)
                if delta.bias is not None and delta.magnitude is not None:
                    raise NunchakuError(f"{module}: DoRA with a bias has no one meaning")
        check_shapes(misfits, len(groups))
        return group_of, left

    def _told(self, form: str, unread: Sequence[str], cls: str) -> tuple[str, ...]:
        if not self._group_of:
            raise NunchakuError(f"this LoRA ({form}) changes no module of a {cls}: it is for another model. Its keys: "
                                f"{some(unread)}")
        texts = [key for key in unread if key.startswith(TEXT)]
        others = [key for key in unread if key not in texts]
        notes = [f"{self.path}: fused into {len(self._group_of)} modules at strength {self.strength:g} ({form})"]
        if texts:
            notes.append(f"{self.path}: {len(texts)} keys are for text encoders, into which they are not fused: "
                         f"{some(texts)}")
        if others:
            notes.append(f"{self.path}: {len(others)} keys find no module: {some(others)}")
        return tuple(notes)


class FusedLora:
    """Weights with LoRAs in them. notes: what each of them changes, and what of them found no place."""

    def __init__(self, weights: Weights, loras: Sequence[Lora]) -> None:
        self.label, self._weights, self._loras = weights.label, weights, list(loras)
        self.tensors: Mapping[str, TensorHeader] = weights.tensors
        self.notes = (*weights.notes, *(note for lora in self._loras for note in lora.notes))
        for lora in self._loras:
            self._check(lora)

    def _check(self, lora: Lora) -> None:
        for module in lora.modules:
            if f"{module}.weight" not in self.tensors:
                raise NunchakuError(f"{lora.path}: changes {module}, of which {self.label} holds no weight")
            if module in lora.with_bias and f"{module}.bias" not in self.tensors:
                raise NunchakuError(f"{lora.path}: changes the bias of {module}, which has none")

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        module, _, leaf = name.rpartition(".")
        added = [_change(tensor.float(), delta, lora.strength) if leaf == "weight" else
                 delta.bias.float() * _scale(delta, lora.strength)
                 for lora in self._loras if (delta := lora.delta(module, leaf)) is not None]
        return sum(added, tensor.float()).to(tensor.dtype) if added else tensor

    def close(self) -> None:
        self._weights.close()


def fuse(weights: Weights, config: dict[str, Any], loras: Sequence[tuple[Path, float]]) -> FusedLora:
    """LoRA files, each with its strength, in the weights of the model that `config` describes."""
    nbytes = sum(tensor.nbytes for tensor in weights.tensors.values())
    target = target_of(empty_model(config, len(weights.tensors), nbytes, weights.label))
    return FusedLora(weights, [Lora(Path(path), strength, target) for path, strength in loras])


def _change(weight: Tensor, delta: Delta, strength: float) -> Tensor:
    """In the shape of the weight, fp32."""
    product = delta.up.float().flatten(1) @ delta.down.float().flatten(1)
    product = (product * _scale(delta, strength)).reshape(weight.shape)
    if delta.magnitude is None:
        return product
    changed = (weight + product).flatten(1)
    grown = delta.magnitude.float()[:, None] / changed.norm(dim=1, keepdim=True) * changed
    return grown.reshape(weight.shape) - weight


def _scale(delta: Delta, strength: float) -> float:
    return strength * delta.alpha / delta.rank


def _tensors(path: Path) -> dict[str, Tensor]:
    """A LoRA's, with the alphas that its metadata holds."""
    with TensorFile(path) as file:
        state = {name: file.read(name) for name in file.names()}
    try:
        metadata = json.loads(file.metadata.get(_METADATA, "{}"))
        return with_metadata_alphas(state, metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise NunchakuError(f"{path}: {_METADATA} cannot be understood: {error}") from error
