"""Nunchaku's own files: one safetensors file, or the older folder of two, become diffusers' class with our linears.

Tensor by tensor: what is held is the model as it grows, and one linear of the file."""
from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import NunchakuError
from ...folders import read_json
from ...models.discover import is_linear
from ...models.flux import split_proj_out
from ...module_tools import dtype_name
from ...progress import Progress
from ...site import Site
from ...swap import Entry, empty_module, fill_module, module_shape, replace_module
from ..build import empty_model, one_line
from ..fill import attach_stored, put, set_compute_dtype
from ..headers import packs_linears, read_header, shown
from ..manifest import entry_from_json, manifest_of
from ..tensor_file import TensorFile
from ..validate import check_keys, check_loaded, split_parameter
from .biases import decoded, same
from .biases import read as read_bias
from .biases import stored as stored_bias
from .describe import OWN
from .families import FAMILIES, T5, Block, Family, Stored, family_of
from .linears import Linear, Tensors, kind_of, read_w4a4, read_w4a16
from .rows import Arrangement, apart

LEGACY = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")

SHIFT = 0.171875
IGNORED = ("attn.pag_to_v.",)  # to_v once more, quantized by itself
log = logging.getLogger("nunchaku_py")


def files_of(path: Path) -> list[Path]:
    """The files of one of Nunchaku's models, or none if that is not what lies there."""
    if path.is_dir():
        files = [path / name for name in LEGACY]
        return files if files[0].is_file() else []
    return [path]


def config_of(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The model's configuration, with the name of its class."""
    if path.is_dir():
        config = read_json(path / "config.json")
    else:
        try:
            config = json.loads(metadata["config"])
        except (KeyError, ValueError, RecursionError) as error:
            raise NunchakuError(f"{path}: its metadata holds no model configuration ('config')") from error
    if not isinstance(config, dict):
        raise NunchakuError(f"{path}: 'config' in its metadata: expected a JSON object")
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    named = (metadata.get("model_class"), config.get("_class_name"))
    families = [family for family in FAMILIES if family.peer in named or family.model in named]
    if not families:
        return config
    if len(families) > 1:
        raise NunchakuError(f"{path}: its metadata says that it is a {families[0].model} and a {families[1].model}")
    family = families[0]
    return {**config, "architectures": [T5.model]} if family is T5 else {**config, "_class_name": family.model}


class Reader:
    """Fills an empty model from a file; `family` None: every packed linear is called as its module."""

    def __init__(self, file: TensorFile, model: nn.Module, source: str, progress: Progress,
                 dtype: torch.dtype | None = None) -> None:
        self.file, self.model, self.source, self.progress = file, model, source, progress
        self.dtype = dtype  # what is not quantized is cast to
        self.family: Family | None = family_of(model)
        self.left = set(file.names())
        self.groups: list[list[str]] = []
        self.loaded: set[str] = set()  # names of the model's tensors
        self._own, self._biases = _own_entries(file.metadata, source)
        self._parts: dict[str, dict[int, Linear]] = {}

    def linears(self) -> None:
        """Every packed linear of the file."""
        for name, block in self.family.blocks_of(self.model) if self.family else ():
            self._block(name, block)
        if self.family is None:
            log.warning("%s: how files of Nunchaku's hold a %s is not known here: every packed linear is taken for the "
                        "one of its name, and none for shifted", self.source, type(self.model).__name__)
        for name in sorted(key.removesuffix(".qweight") for key in self.left if key.endswith(".qweight")):
            self._linear(Stored(name, (name,)), "")

    # --------------------------------------------------------------------------------------------------- blocks
    def _block(self, prefix: str, block: Block) -> None:
        for stored in block.linears:
            name = f"{prefix}.{stored.name}"
            if f"{name}.qweight" in self.left:
                self._linear(stored, f"{prefix}.")
            elif f"{name}.weight" in self.left and stored.modules != (stored.name,):
                self._dense(stored, f"{prefix}.")
            elif not self._modules_are_there(stored, f"{prefix}."):
                raise NunchakuError(f"{self.source}: {name}.qweight is missing")
        for old, new in block.renamed.items():
            if f"{prefix}.{old}" in self.left:
                self._rename(f"{prefix}.{old}", f"{prefix}.{new}", old in block.interleaved)
        for start in (f"{prefix}.{name}" for name in IGNORED):
            ignored = {name for name in self.left if name.startswith(start)}
            if ignored:
                log.warning("%s: %s and %d more tensors are left out: a projection that the model has already",
                            self.source, min(ignored), len(ignored) - 1)
            self.left -= ignored

    def _modules_are_there(self, stored: Stored, prefix: str) -> bool:
        return stored.part is None and all(f"{prefix}{module}.weight" in self.left for module in stored.modules)

    def _rename(self, old: str, new: str, interleaved: bool) -> None:
        tensor = self._take(old)
        if interleaved:
            tensor = self._even(old, tensor)
            if tensor.ndim == 4 and tensor.shape[-1] == 1:  # (C, 3, 3, 1) of a depthwise convolution
                tensor = tensor.movedim(-1, 1).contiguous()
        self._put(new, tensor)

    def _even(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 1 or tensor.shape[0] % 2:
            raise NunchakuError(f"{self.source}: {name}: expected pairs of rows, got {tuple(tensor.shape)}")
        return apart(tensor, 2)

    def _take(self, name: str) -> Tensor:
        self.left.discard(name)
        return self.file.read(name)

    def _put(self, name: str, tensor: Tensor) -> None:
        put(self.model, name, tensor, self.dtype, self.source)
        self.loaded.add(name)

    def _dense(self, stored: Stored, prefix: str) -> None:
        """Some linears as one, in 16 bit."""
        modules = [self._module(f"{prefix}{module}") for module in stored.modules]
        sizes = [module_shape(module)[0] for module in modules]
        for leaf in ("weight", "bias"):
            name = f"{prefix}{stored.name}.{leaf}"
            if name not in self.left:
                continue
            tensor = self._take(name)
            if tensor.ndim < 1 or tensor.shape[0] != sum(sizes):
                raise NunchakuError(f"{self.source}: {name}: expected {sum(sizes)} rows, got {tuple(tensor.shape)}")
            for module, rows in zip(stored.modules, tensor.split(sizes), strict=True):
                self._put(f"{prefix}{module}.{leaf}", rows.clone())

    # -------------------------------------------------------------------------------------------------- linears
    def _module(self, name: str) -> nn.Module:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            module = None
        if not (isinstance(module, nn.Linear) or is_linear(module)):
            cls = type(self.model).__name__
            raise NunchakuError(f"{self.source}: {shown(name)}.qweight: {cls} has no linear of this name")
        return module

    def _linear(self, stored: Stored, prefix: str) -> None:
        names = [f"{prefix}{module}" for module in stored.modules]
        modules = [self._module(name) for name in names]
        tensors = Tensors(self.file.read, self.file.tensors, prefix + stored.name, self.source)
        first, last = self._columns(stored, prefix, modules[0])
        order = Arrangement(stored, tuple(module_shape(module)[0] for module in modules))
        if stored.spread and (order.total % stored.spread or kind_of(tensors) != "w4a16"):
            raise NunchakuError(f"{self.source}: {tensors.name}: expected a modulation of {stored.spread} outputs a "
                                f"channel in W4A16, with wzeros; its linear has {order.total}")
        read = read_w4a4 if kind_of(tensors) == "w4a4" else read_w4a16
        linear = read(tensors, order.total, last - first)
        self.left -= set(tensors.used)
        self.progress.advance(sum(self.file.tensors[key].nbytes for key in tensors.used))
        self._refuse_others(tensors)
        if linear.divisor is not None and not self._both_sides_are_held(stored, prefix):
            linear.divisor = None
        linears = order.apart(linear)
        for name, module, found in zip(names, modules, linears, strict=True):
            found.bias = None if found.bias is None else self._exact(name, found.bias, stored.spread)
            self._place(name, module, found, stored, first)
        if len(names) > 1:
            self.groups.append(names)
        if linear.divisor is not None:
            self._divided(stored, prefix, linear.divisor)

    def _exact(self, name: str, bias: Tensor, spread: int) -> Tensor:
        """As it was before a file in 16 bit was made of it, if that is the file we made."""
        if name in self._biases:
            exact = decoded(self._biases[name], f"{self.source}: {name}")
            if exact.shape == bias.shape and same(stored_bias(exact, spread, bias.dtype), bias):
                return exact
        return read_bias(bias, spread)

    def _refuse_others(self, tensors: Tensors) -> None:
        other = sorted(name for name in self.left if name.rpartition(".")[0] == tensors.name)
        if other:
            raise NunchakuError(f"{self.source}: {shown(other[0])} is unexpected: a packed linear has no such tensor")

    def _columns(self, stored: Stored, prefix: str, module: nn.Module) -> tuple[int, int]:
        if stored.part is None:
            return 0, module_shape(module)[1]
        parts = split_proj_out(module, self.model.get_submodule(prefix.removesuffix(".")))
        if parts is None:
            raise NunchakuError(f"{self.source}: {prefix}{stored.modules[0]} cannot be held in two parts here")
        return parts[stored.part][:2]

    def _place(self, name: str, module: nn.Module, linear: Linear, stored: Stored, first: int) -> None:
        if stored.part is not None:
            parts = self._parts.setdefault(name, {})
            parts[first] = linear
            if len(parts) == 2:
                self._install(name, module, [parts[start] for start in sorted(parts)], [False, True])
        else:
            self._install(name, module, [linear], [stored.gelu])

    def _install(self, name: str, module: nn.Module, linears: Sequence[Linear], gelu: Sequence[bool]) -> None:
        sites = [self._site(name, i if len(linears) > 1 else None, *pair)
                 for i, pair in enumerate(zip(linears, gelu, strict=True))]
        if module.bias is not None and any(linear.bias is None for linear in linears):  # each part has one, if of zeros
            raise NunchakuError(f"{self.source}: {name}: the file holds no bias for it, and "
                                f"{type(self.model).__name__} has one")
        bias = _bias_of(linears, module.bias is not None or any(site.shift for site in sites))
        whole = len(linears) == 1
        starts = [sum(linear.k for linear in linears[:i]) for i in range(len(linears) + 1)]
        entry: Entry = sites[0] if whole else tuple(zip(zip(starts, starts[1:], strict=False), sites, strict=True))
        tensors = {} if bias is None else {"bias": bias}
        for i, (linear, site) in enumerate(zip(linears, sites, strict=True)):
            prefix = "" if whole else f"parts.{i}."
            tensors |= {prefix + leaf: tensor for leaf, tensor in _canonical(linear, site).items()}
        dtype = (linears[0].smooth if linears[0].smooth is not None else linears[0].scales).dtype
        new = empty_module(module, entry, bias is not None, dtype)
        fill_module(new, tensors, f"{self.source}: {name}")
        replace_module(self.model, name, new)
        self.loaded |= {f"{name}.{leaf}" for leaf in tensors}

    def _site(self, name: str, part: int | None, linear: Linear, gelu: bool) -> Site:
        own = self._own.get(name)
        if isinstance(own, tuple):
            own = own[part][1] if part is not None and part < len(own) else None
        rank = own.rank if isinstance(own, Site) and _is_padding(linear, own.rank) else linear.rank
        if linear.smooth is None:
            return Site("w4a16", linear.format, linear.group)
        shifted = gelu and linear.format == "int4"
        divided = {} if linear.divisor is None else {"divided": "input"}
        return Site("w4a4", linear.format, linear.group, rank, SHIFT if shifted else 0.0, shifted, **divided)

    def _both_sides_are_held(self, stored: Stored, prefix: str) -> bool:
        """A linear in 16 bit cannot say that its outputs are divided. Then neither side does: undoing one of them, as
        nq.dequantize would, makes another network."""
        before = [self.model.get_submodule(f"{prefix}{module}") for module in stored.divides]
        if before and all(getattr(module, "is_nunchaku_quantized", False) for module in before):
            return True
        log.warning("%s: %s%s: its smoothing was fused into a linear that is not quantized here: a LoRA on either will "
                    "be a little off, and smooth_orig is not kept", self.source, prefix, stored.name)
        return False

    def _divided(self, stored: Stored, prefix: str, divisor: Tensor) -> None:
        """The linears whose outputs become the input that arrives divided say so."""
        for name in (f"{prefix}{module}" for module in stored.divides):
            module = self.model.get_submodule(name)
            if module.site.divided:
                if not torch.equal(module.divisor, divisor):
                    raise NunchakuError(f"{self.source}: {prefix}{stored.name}.smooth_orig: is not that of the other "
                                        f"linear behind {name}, whose outputs cannot be divided by both")
                continue
            site = Site(**{**vars(module.site), "divided": "output"})
            new = empty_module(module, site, module.bias is not None, module.file_dtype)
            fill_module(new, {**module.state_dict(), "divisor": divisor.clone()}, f"{self.source}: {name}")
            replace_module(self.model, name, new)
            self.loaded.add(f"{name}.divisor")


def _own_entries(metadata: dict[str, str], source: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """What we say of a file that we wrote: the sites, whose ranks are without what pads them, and exact biases."""
    if OWN not in metadata:
        return {}, {}
    try:
        found = json.loads(metadata[OWN])
        biases = found.get("biases", {})
        return {name: entry_from_json(entry) for name, entry in found["sites"].items()}, {**biases}
    except (NunchakuError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise NunchakuError(f"{source}: its metadata entry {OWN!r} cannot be understood: {one_line(error)}") from error


def _bias_of(linears: Sequence[Linear], needed: bool) -> Tensor | None:
    """Files hold a bias for every linear, and one for every part: zeros where there is none."""
    found = [linear.bias for linear in linears if linear.bias is not None and bool((linear.bias != 0).any())]
    if not found:
        first = next((linear.bias for linear in linears if linear.bias is not None), None)
        zeros = torch.zeros(linears[0].codes.shape[0], dtype=linears[0].scales.dtype) if first is None else first
        return zeros if needed else None
    return found[0] if len(found) == 1 else sum(bias.float() for bias in found)


def _is_padding(linear: Linear, rank: int) -> bool:
    """Whether the ranks from here on are zeros: another tool may have put a LoRA there."""
    return rank <= linear.rank and (linear.down is None or not (linear.down[rank:].any() or linear.up[:, rank:].any()))


def _canonical(linear: Linear, site: Site) -> dict[str, Tensor]:
    found = {"codes": linear.codes, "scales": linear.scales, "zeros": linear.zeros,
             "channel_scale": linear.channel_scale, "smooth": linear.smooth, "divisor": linear.divisor,
             "down": linear.down, "up": linear.up}
    if site.rank < linear.rank:
        found["down"], found["up"] = linear.down[:site.rank], linear.up[:, :site.rank]
    if not site.rank:
        found["down"] = found["up"] = None
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def is_nunchaku(path: Path) -> bool:
    """Whether this file, or folder, is one of Nunchaku's, by the names of its tensors."""
    files = files_of(path)
    return bool(files) and packs_linears(read_header(files[0]))


def read_nunchaku(path: Path, mode: str, dtype: torch.dtype | None) -> nn.Module:
    """The ordinary class of diffusers or transformers, with quantized linears."""
    source = str(path)
    with TensorFile(files_of(path)) as file, torch.device("cpu"):  # whatever torch's default is
        nbytes = sum(tensor.nbytes for tensor in file.tensors.values())
        model = empty_model(config_of(path, file.metadata), len(file.tensors), nbytes, source)
        with Progress(nbytes, f"reading {path.name}") as progress:
            reader = Reader(file, model, source, progress, dtype)
            reader.linears()
        check_keys(model, reader.loaded | reader.left | set(tied(model, reader.left)), source)
        wanted = set(model.state_dict())
        for name in sorted(reader.left & wanted):  # a model may allow tensors that it does not have
            put(model, name, file.read(name), dtype, source)
        _tie(model, reader.left)
        set_compute_dtype(model, dtype)
        check_loaded(model, source, mode)
        attach_stored(model, _described(model, reader), source)
    return model.eval()


def tied(model: nn.Module, there: set[str]) -> dict[str, str]:
    """Tensors that a file lacks → those of it that they stand for."""
    both = [(name, other) for pair in _pairs(model) for name, other in (pair, pair[::-1])]
    return {name: other for name, other in both if name not in there and other in there}


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of tensors that are one."""
    pairs = getattr(model, "_tied_weights_keys", None)
    return list(pairs.items()) if isinstance(pairs, dict) else []


def _tie(model: nn.Module, there: set[str]) -> None:
    """Files hold such a tensor once, or twice the same."""
    twice = {second: first for second, first in _pairs(model) if second in there and first in there
             and torch.equal(model.get_parameter(second), model.get_parameter(first))}
    for name, other in {**tied(model, there), **twice}.items():
        module, leaf = split_parameter(model, name)
        module._parameters[leaf] = model.get_parameter(other)


def _described(model: nn.Module, reader: Reader) -> dict[str, Any]:
    """`quantization_config` of the model as we write it, with the metadata that Nunchaku's readers want back."""
    kept = {key: value for key, value in reader.file.metadata.items() if key not in ("config", "format", OWN)}
    manifest = manifest_of(model, "imported", reader.groups, {"source": {"format": "nunchaku", "metadata": kept}})
    dtypes = Counter(p.dtype for name, p in model.named_parameters()
                     if name in reader.left and p.is_floating_point())
    dtype = dtypes.most_common(1)[0][0] if dtypes else manifest.dtype
    return {**manifest.to_json(), "model_dtype": dtype_name(dtype)}
