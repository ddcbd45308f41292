"""A quantized model as a file of Nunchaku's, for its engine and those that read its files.

Written linear by linear. What 16 bit, or the peer's kernels, force upon a value is noted and reported."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import NunchakuError
from ...formats import INT4, Format, format_of
from ...linear import QuantizedSite
from ...module_tools import dtype_name
from ...progress import Progress
from ...site import shift_correction
from ...split_linear import SplitLinear
from ...swap import quantized_modules
from ..notes import Notes
from ..rounding import note_bias, note_scales, rounded_again
from ..tensor_file import write_tensors
from . import biases
from .describe import metadata_of
from .families import T5, Block, Stored, family_of, stored_so_in_16_bit
from .layouts import CHANNELS, whole
from .linears import (
    GROUPS,
    HALVES,
    LONG,
    SHORT,
    TEXT_GROUP,
    Linear,
    Shapes,
    packed_w4a4,
    packed_w4a16,
    shapes_w4a4,
    shapes_w4a16,
)
from .packing import awq_fits, pack_vector, padded_rank
from .read import SHIFT
from .rows import SHARED, Arrangement, together


@dataclass(frozen=True)
class Item:
    """A linear of the file, with the modules it is made of."""

    name: str
    stored: Stored
    prefix: str

    @property
    def modules(self) -> list[str]:
        return [f"{self.prefix}{module}" for module in self.stored.modules]


class Writer:
    """One model, one file."""

    def __init__(self, model: nn.Module) -> None:
        family = family_of(model)
        if family is None:
            raise NunchakuError(f"{type(model).__name__}: Nunchaku has no files of this architecture; diffusers' form "
                                "of them (nunchaku_lite) takes any")
        self.model, self.family, self.notes = model, family, Notes()
        self.quantized = quantized_modules(model)
        self.items = list(self._items())
        self._check_all_or_none()
        self.format = self._format()
        sites = [site for site in model.modules() if isinstance(site, QuantizedSite) and site.site.has_smooth]
        self.rank = padded_rank(max((site.site.rank for site in sites), default=0))
        self.dtype = next(iter(s.file_dtype for s in model.modules() if isinstance(s, QuantizedSite)))

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype) of every tensor of the file."""
        found = {f"{item.name}.{leaf}": shape for item in self.items for leaf, shape in self._shapes(item).items()}
        return found | {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._others()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same names, with the tensors; made one linear at a time."""
        for item in self.items:
            yield from ((f"{item.name}.{leaf}", tensor) for leaf, tensor in self._packed(item).items())
        yield from self._others()

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        """What is in 16 bit."""
        names = dict(self._renamed())
        pairs = {f"{name}.{old}" for name, block in self.family.blocks_of(self.model) for old in block.interleaved}
        joined = dict(self._joined_dense())
        elsewhere = {leaf for leaves in joined.values() for leaf in leaves}
        packed = tuple(f"{module}." for item in self.items for module in item.modules)
        for name, tensor in self.model.state_dict().items():
            if name not in elsewhere and not name.startswith(packed):
                new = names.get(name, name)
                yield new, self._cast(_as_depthwise(together(tensor, 2)) if new in pairs else tensor)
        for name, leaves in joined.items():
            yield name, self._cast(torch.cat([self.model.get_parameter(leaf).data for leaf in leaves]))

    def _cast(self, tensor: Tensor) -> Tensor:
        """Of the two 16-bit types a file has one, that of the linears: the model may have been loaded in the other."""
        if tensor.dtype == self.dtype or tensor.dtype not in HALVES:
            return tensor
        found = tensor.to(self.dtype)
        change = (found.float() - tensor.float()).abs().max().item() if tensor.numel() else 0.0
        self.notes.add(f"tensors in {dtype_name(tensor.dtype)}, cast to {dtype_name(self.dtype)}", change)
        return found

    # ------------------------------------------------------------------------------------------- what there is
    def _items(self) -> Iterator[Item]:
        covered: set[str] = set()
        for name, block in self.family.blocks_of(self.model):
            for stored in block.linears:
                item = Item(f"{name}.{stored.name}", stored, f"{name}.")
                if self._is_packed(item, block):
                    covered.update(item.modules)
                    yield item
        for name in self.quantized:
            if name in covered:
                continue
            if self.family.blocks:
                raise NunchakuError(f"{name}: is quantized, and Nunchaku's files hold it in 16 bit; quantize the model "
                                    f"with a rule {name!r}: 'keep', or write nunchaku_lite")
            yield Item(name, Stored(name, (name,)), "")

    def _is_packed(self, item: Item, block: Block) -> bool:
        found = [module in self.quantized for module in item.modules]
        if any(found) and not all(found) or (item.stored.dense and any(found)):
            name = item.modules[found.index(item.stored.dense)]
            raise NunchakuError(f"{name}: Nunchaku's files hold {' and '.join(item.modules)} alike, as {item.name}, "
                                f"{'in 16 bit' if item.stored.dense else 'in 4 bits or in 16'}")
        if not any(found) and not item.stored.dense and not re.fullmatch(self.family.may_be_dense, item.name):
            raise NunchakuError(f"{item.modules[0]}: is in 16 bit, and Nunchaku's files hold it in 4 bits; quantize it "
                                "too, or write nunchaku_lite")
        return all(found)

    def _check_all_or_none(self) -> None:
        """A file says in one word whether those that may be in 16 bit are."""
        packed = {item.name for item in self.items}
        names = [f"{prefix}.{stored.name}" for prefix, block in self.family.blocks_of(self.model)
                 for stored in block.linears if re.fullmatch(self.family.may_be_dense, f"{prefix}.{stored.name}")]
        dense = [name for name in names if name not in packed]
        if dense and len(dense) < len(names):
            other = next(name for name in names if name in packed)
            raise NunchakuError(f"{dense[0]}: is in 16 bit and {other} is not: Nunchaku's files hold all linears of "
                                f"refiners in 4 bits, or none")

    def _format(self) -> str:
        """Of the W4A4 linears, which is one for a file."""
        formats = {site.site.format for site in self.model.modules()
                   if isinstance(site, QuantizedSite) and site.site.has_smooth}
        if len(formats) > 1:
            raise NunchakuError("linears are in int4 and in nvfp4: a file of Nunchaku's has one of them")
        return next(iter(formats), "int4")

    def _renamed(self) -> Iterator[tuple[str, str]]:
        """(the model's name, the file's)."""
        for name, block in self.family.blocks_of(self.model):
            yield from ((f"{name}.{new}", f"{name}.{old}") for old, new in block.renamed.items())

    def _joined_dense(self) -> Iterator[tuple[str, list[str]]]:
        """(name in the file, names in the model) of linears that are one in 16 bit."""
        packed = {item.name for item in self.items}
        for prefix, block in self.family.blocks_of(self.model):
            for stored in block.linears:
                name = f"{prefix}.{stored.name}"
                if name in packed or not stored_so_in_16_bit(stored):
                    continue
                for leaf in ("weight", "bias"):
                    leaves = [f"{prefix}.{module}.{leaf}" for module in stored.modules]
                    if self.model.get_submodule(f"{prefix}.{stored.modules[0]}")._parameters.get(leaf) is not None:
                        yield f"{name}.{leaf}", leaves

    # ------------------------------------------------------------------------------------------------- packing
    def _packed(self, item: Item) -> dict[str, Tensor]:
        linears = [self._linear(name, item.stored) for name in item.modules]
        sizes = tuple(linear.codes.shape[0] for linear in linears)
        self._check_alike(item, linears)
        some = any(linear.bias is not None for linear in linears)
        for name, linear in zip(item.modules, linears, strict=True):
            missing = some and linear.bias is None
            bias = linear.codes.new_zeros(linear.codes.shape[0], dtype=self.dtype) if missing else linear.bias
            linear.bias = self._stored_bias(name, bias, item.stored.spread)
        linear = Arrangement(item.stored, sizes).joined(linears)
        if linear.smooth is None:
            try:
                return packed_w4a16(linear)
            except NunchakuError as error:
                raise NunchakuError(f"{item.modules[0]}: {error}") from error
        names = SHORT if self.family.short_names else LONG
        found = packed_w4a4(linear, self.rank, names, self.dtype)
        if not self._has_bias(item):
            del found["bias"]
        return {**found, **self._second_scale(item, linear.channel_scale)}

    def _shapes(self, item: Item) -> Shapes:
        """Of what `_packed` gives."""
        sites = [self._site(name, item.stored) for name in item.modules]
        order = Arrangement(item.stored, tuple(site.rows_out for site in sites))
        n, k, first = order.total, sites[0].rows_in, sites[0].site
        if not first.has_smooth:
            bias = item.stored.spread > 0 or sites[0].bias is not None
            return shapes_w4a16(self._awq_format().group, n, k, bias, self.dtype)
        found = shapes_w4a4(first, n, k, self.rank, SHORT if self.family.short_names else LONG, self.dtype)
        if not self._has_bias(item):
            del found["bias"]
        if first.format == "nvfp4":
            scales = torch.cat([site.channel_scale.data for site in sites])
            leaf = next(iter(self._second_scale(item, scales)))
            found[leaf] = ((1 if leaf == "wtscale" else whole(n, CHANNELS),), self.dtype)
        return found

    def _has_bias(self, item: Item) -> bool:
        """Of a W4A4 linear: whether the file has one, zeros where there is none here."""
        return self.family.every_bias or any(self.quantized[name].bias is not None for name in item.modules)

    def _site(self, name: str, stored: Stored) -> QuantizedSite:
        """The linear of this name, or the part of it that is meant."""
        module, part = self.quantized[name], stored.part
        if (part is not None) != isinstance(module, SplitLinear):
            raise NunchakuError(f"{name}: is {'whole' if part is not None else 'in parts'}, and Nunchaku's files hold "
                                f"it {'in two parts' if part is not None else 'whole'}; write nunchaku_lite")
        if part is None:
            return module
        if len(module.parts) != 2:
            raise NunchakuError(f"{name}: has {len(module.parts)} parts, and Nunchaku's files hold two")
        return module.parts[part]

    def _linear(self, name: str, stored: Stored) -> Linear:
        site, bias = self._site(name, stored), self.quantized[name].bias
        return self._of_site(name, site, None if stored.part == 0 else bias, stored)

    def _of_site(self, name: str, module: QuantizedSite, bias: Tensor | None, stored: Stored) -> Linear:
        site, weight = module.site, module.qtensor()
        linear = Linear(site.format, site.group, module.rows_in, weight.codes, weight.scales, weight.zeros,
                        weight.channel_scale, bias=None if bias is None else bias.data)
        for leaf in ("smooth", "down", "up"):
            tensor = module._parameters.get(leaf)
            setattr(linear, leaf, None if tensor is None else tensor.data)
        if site.divided == "input":
            linear.divisor = module.divisor.data
        if not site.has_smooth:
            return self._for_awq(name, linear)
        self._check_w4a4(name, site)
        return self._shifted(module, linear, self._shift_of(module, stored))

    def _shift_of(self, module: QuantizedSite, stored: Stored) -> float:
        """What the peer adds to the input of such a linear."""
        return SHIFT if stored.gelu and module.site.format == "int4" and module.site.has_smooth else 0.0

    def _check_w4a4(self, name: str, site: Any) -> None:
        if site.group != GROUPS[site.format]:
            raise NunchakuError(f"{name}: is in groups of {site.group}, and Nunchaku's files hold {site.format} in "
                                f"groups of {GROUPS[site.format]}")

    def _check_alike(self, item: Item, linears: Sequence[Linear]) -> None:
        first = linears[0]
        for name, other in zip(item.modules[1:], linears[1:], strict=True):
            for leaf in SHARED:
                mine, its = getattr(first, leaf), getattr(other, leaf)
                if (mine is None) != (its is None) or mine is not None and not torch.equal(mine, its):
                    raise NunchakuError(f"{name}: its {leaf} is not that of {item.modules[0]}, and Nunchaku's files "
                                        f"hold both as one linear, {item.name}")

    def _for_awq(self, name: str, linear: Linear) -> Linear:
        """In groups that the peer's kernels know; else rounded again."""
        wanted = self._awq_format()
        if not awq_fits(linear.codes.shape[0], linear.k, wanted.group):
            raise NunchakuError(f"{name}: a linear of {linear.k} inputs and {linear.codes.shape[0]} outputs cannot be "
                                "held as Nunchaku's files hold such linears")
        if linear.group == wanted.group and linear.format in ("uint4", wanted.name):
            return linear
        new = rounded_again(self.quantized[name].qtensor(), wanted, self.dtype, self.notes)
        return Linear(wanted.name, wanted.group, linear.k, new.codes, new.scales, new.zeros, bias=linear.bias)

    def _awq_format(self) -> Format:
        return format_of("uint4", TEXT_GROUP) if self.family is T5 else INT4

    def _shifted(self, module: QuantizedSite, linear: Linear, shift: float) -> Linear:
        """With the bias that the peer's shift asks for, where that is not the site's."""
        if module.site.shift != shift:
            more = shift_correction(module.qtensor(), module.smooth.data, module.site.shift - shift)
            linear.bias = more if linear.bias is None else linear.bias.float() + more
        return linear

    def _stored_bias(self, name: str, bias: Tensor | None, spread: int) -> Tensor | None:
        if bias is None and not spread:
            return None
        bias = torch.zeros(self.quantized[name].rows_out) if bias is None else bias
        found = biases.stored(bias, spread, self.dtype)
        if not found.isfinite().all():
            raise NunchakuError(f"{name}.bias: holds values too large for the file's {dtype_name(self.dtype)}")
        of = "modulations, to which 1 is added" if spread else "linears"
        note_bias(bias, biases.read(found, spread), self.notes, f"{of}, rounded to 16 bit for other readers")
        return found

    def exact_biases(self) -> dict[str, str]:
        """Those of which the file cannot hold every bit, encoded."""
        found = {}
        for item in self.items:
            for name in item.modules if item.stored.part != 0 else ():
                bias, site = self.quantized[name].bias, self._site(name, item.stored)
                if bias is None or self._shift_of(site, item.stored) != site.site.shift:
                    continue
                spread = item.stored.spread
                if not biases.same(biases.read(biases.stored(bias.data, spread, self.dtype), spread), bias.data):
                    found[name] = biases.encoded(bias.data)
        return found

    def _second_scale(self, item: Item, scale: Tensor | None) -> dict[str, Tensor]:
        """One number for a linear that has but one, as Nunchaku's own quantizer writes it; else one a channel."""
        if scale is None:
            return {}
        stored = scale.to(self.dtype)
        note_scales(scale, stored.float(), self.notes)
        if len(item.modules) == 1 and not self.family.by_channel and bool((stored == stored[0]).all()):
            return {"wtscale": stored[:1].clone()}
        return {"wcscales": pack_vector(stored, 1)}


def _as_depthwise(tensor: Tensor) -> Tensor:
    """(C, 1, 3, 3) of a convolution as (C, 3, 3, 1)."""
    return tensor.movedim(1, -1).contiguous() if tensor.ndim == 4 else tensor.contiguous()


def write(model: nn.Module, path: Path) -> Notes:
    """Write the file; says what could not be kept bit for bit."""
    with torch.device("cpu"):  # whatever torch's default is
        writer = Writer(model)
        layout = writer.layout()
        writer.notes = Notes()
        nbytes = sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        with Progress(nbytes, f"writing {path.name}") as progress:
            write_tensors(path, layout, _shown(writer.tensors(), progress), metadata_of(writer))
    return writer.notes


def _shown(tensors: Iterator[tuple[str, Tensor]], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        progress.advance(tensor.nbytes)
