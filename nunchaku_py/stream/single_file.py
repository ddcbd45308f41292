"""Models in one file with the names of their makers (BFL, Stability, ComfyUI, …): diffusers' own converters run once,
on tensors that are not read yet, and what they made of the file is then read tensor by tensor."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.build import empty_model, one_line
from ..checkpoint.headers import TensorHeader, shown
from ..checkpoint.nunchaku.read import tied
from ..checkpoint.tensor_file import DTYPES, NAMES, TensorFile
from ..checkpoint.validate import check_keys, some
from ..errors import NunchakuError
from ..lora.keys import parse
from .configs import config_of, found_config
from .fp8 import in_16_bit
from .lazy import LazyTensor, evaluate, lazy, names_in
from .weights import FLOATS, Source, Weights

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of the denoiser, beside text encoders and VAE
_UNET = "UNet2DConditionModel"  # diffusers' converter of it wants the first prefix, others do well without
_QUANTIZED = ("qweight", "codes", "absmax", "quant_state", "quant_map", "weight_packed", "SCB", "weight_scale_2")
_LORA = ("down", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # parts that every adapter has one of
_log = logging.getLogger("nunchaku_py")
Lazies = dict[str, LazyTensor]


class ConvertedWeights:
    """A file's tensors under diffusers' names. notes: what of the file is no part of the model."""

    def __init__(self, source: Source, lazies: Lazies, notes: tuple[str, ...]) -> None:
        self.label, self.notes, self._source, self._lazies = source.label, notes, source, lazies
        self.tensors: Mapping[str, TensorHeader] = {name: _header(tensor) for name, tensor in lazies.items()}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._lazies:
            raise NunchakuError(f"{self.label}: holds no tensor {shown(name)}")
        return evaluate(self._lazies[name], self._source.read)

    def close(self) -> None:
        self._source.close()


def open_single_file(path: Path, config: Path | None = None) -> tuple[dict[str, Any], Weights]:
    """(config, weights) of a safetensors file. config: the folder of a model or pipeline of the same kind, which files
    other than FLUX.1's and SDXL's need."""
    file = TensorFile(path)
    check_16_bit(file.label, file.tensors)
    return opened(in_16_bit(file, file.metadata), config)


def opened(source: Source, config: Path | None) -> tuple[dict[str, Any], Weights]:
    """The model in a source, whoever named its tensors."""
    names, notes = _of_the_model(source.tensors)
    tensors = {name: source.tensors[place] for name, place in names.items()}
    found = found_config(tensors, source.label) if config is None else config_of(Path(config))
    try:
        lazies = _lazies_of(found, names, source)
    except NunchakuError as error:
        if config is not None:
            raise
        raise NunchakuError(f"{error} (the config was found from its shapes; --config MODEL_DIR names another)"
                            ) from error
    unread = set(names.values()).difference(*map(names_in, lazies.values()))
    if unread:
        notes += (f"{len(unread)} tensors are no part of the model: {some(sorted(unread))}",)
    for note in notes:
        _log.info("%s: %s", source.label, note)
    return found, ConvertedWeights(source, lazies, notes)


def _lazies_of(config: dict[str, Any], names: Mapping[str, str], source: Source) -> Lazies:
    """names: name without prefix → that in the source."""
    held = {name: source.tensors[place] for name, place in names.items()}
    model = empty_model(config, len(held), sum(tensor.nbytes for tensor in held.values()), source.label)
    lazies = {name: lazy(names[name], tensor.shape, DTYPES[tensor.dtype]) for name, tensor in held.items()}
    if not set(model.state_dict()) <= set(lazies):
        lazies = _converted(lazies, model, source.label)
    return _checked(lazies, model, source.label)


def check_16_bit(label: str, tensors: Mapping[str, TensorHeader]) -> None:
    """Refuse what is no model, and models that are quantized already."""
    if any((key := parse(name)) and key.part in _LORA for name in tensors):
        raise NunchakuError(f"{label}: is a LoRA, no model; --lora fuses it into one")
    leaves = {name.rpartition(".")[2]: name for name in tensors}
    found = next((leaves[leaf] for leaf in _QUANTIZED if leaf in leaves), None)
    found = found or next((name for name in tensors if ".quant_state." in name), None)
    found = found or next((name for name, tensor in tensors.items() if tensor.dtype not in DTYPES), None)
    if found is not None:
        raise NunchakuError(f"{label}: is already quantized (it holds {shown(found)}, {tensors[found].dtype}); "
                            "quantizing needs the 16-bit weights that it was made from")


def _of_the_model(tensors: Mapping[str, TensorHeader]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(name without the prefix of the file → name in it, notes)"""
    for prefix in _PREFIXES:
        names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        if names:
            others = sorted(set(tensors) - set(names.values()))
            return names, (f"{len(others)} tensors are of other models: {some(others)}",) if others else ()
    return {name: name for name in tensors}, ()


def _converted(lazies: Lazies, model: nn.Module, label: str) -> Lazies:
    """By diffusers' converter of this class; as they are, where it has none."""
    cls = type(model)
    convert = _converter(cls)
    if convert is None:
        return lazies
    prefix = _PREFIXES[0] if cls.__name__ == _UNET else ""
    try:
        made = convert(checkpoint={prefix + name: tensor for name, tensor in lazies.items()}, config=dict(model.config))
    except NunchakuError as error:
        raise NunchakuError(f"{label}: cannot be read tensor by tensor as a {cls.__name__}: {error}") from error
    except KeyError as error:
        raise NunchakuError(f"{label}: lacks the tensor {shown(str(error.args[0]))}, which a {cls.__name__} with the "
                            "names of its makers has") from error
    except Exception as error:  # whatever a converter does with tensors that it was not written for
        raise NunchakuError(f"{label}: is no {cls.__name__} that diffusers converts: {one_line(error)}") from error
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, LazyTensor)}


def _converter(cls: type) -> Callable[..., Mapping[str, Any]] | None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

    name = next((base.__name__ for base in cls.__mro__ if base.__name__ in CLASSES), None)
    return None if name is None else CLASSES[name]["checkpoint_mapping_fn"]


def _checked(lazies: Lazies, model: nn.Module, label: str) -> Lazies:
    """All tensors of the model, in its order and with its shapes, and no others; of tied ones those that are there."""
    check_keys(model, {*lazies, *tied(model, set(lazies))}, label)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name in lazies}
    for name, tensor in expected.items():
        found = lazies[name]
        if found.shape != tensor.shape:
            raise NunchakuError(f"{label}: {name}: expected {tuple(tensor.shape)} for a {type(model).__name__} of its "
                                f"config, got {tuple(found.shape)}")
        if tensor.is_floating_point() and NAMES[found.dtype] not in FLOATS:
            raise NunchakuError(f"{label}: {name}: expected one of {', '.join(FLOATS)}, got {NAMES[found.dtype]}: "
                                "quantizing needs 16-bit weights")
    return {name: lazies[name] for name in expected}


def _header(tensor: LazyTensor) -> TensorHeader:
    return TensorHeader(NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
