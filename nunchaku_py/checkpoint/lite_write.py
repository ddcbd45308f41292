"""A quantized model as a nunchaku_lite folder of diffusers', for its own quantizer and for others that read such.

Linear by linear. What the format cannot hold is written in 16 bit; what changes is noted."""
from __future__ import annotations

import json
from collections.abc import Iterator
from math import frexp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NunchakuError
from ..formats import INT4, UINT4
from ..linear import QuantizedSite
from ..module_tools import dtype_name
from ..split_linear import SplitLinear
from ..swap import Quantized, quantized_modules
from .lite_config import OWN, QUANT_METHOD, W4A4, W4A16
from .notes import Notes
from .nunchaku import packing
from .nunchaku.describe import config_of
from .nunchaku.layouts import AWQ_COLUMNS, AWQ_ROWS, CHANNELS
from .nunchaku.linears import AWQ_GROUP, GROUPS, LONG, Linear, Shapes, as_unsigned, packed_w4a4, shapes_w4a4
from .rounding import note_bias, note_scales, rounded_again
from .tensor_file import write_tensors
from .validate import check_state

FILE = "diffusion_pytorch_model.safetensors"
_NEGLIGIBLE = 1e-3  # of a shift's correction: what adding it in fp32, and taking it off again, leaves of it


class LiteWriter:
    """One model, one folder. The plan: name → "w4a4", "w4a16", or why the linear is written in 16 bit."""

    def __init__(self, model: nn.Module) -> None:
        if not hasattr(model, "register_to_config"):
            raise NunchakuError(f"{type(model).__name__}: nunchaku_lite folders are of diffusers' models")
        check_state(model.state_dict())
        self.model, self.notes = model, Notes()
        self.quantized = quantized_modules(model)
        if not self.quantized:
            raise NunchakuError(f"{type(model).__name__} holds no quantized linears")
        self.dtype = _sites(next(iter(self.quantized.values())))[0].file_dtype
        self.empty = _empty(model)
        self.plan = {name: self._kind(name, module) for name, module in self.quantized.items()}
        self.format = self._format()
        ranks = [self._rank(name) for name in self._of("w4a4")]
        self.rank = packing.padded_rank(max(ranks, default=0))

    # ---------------------------------------------------------------------------------------------- what becomes what
    def _of(self, kind: str) -> list[str]:
        return [name for name, found in self.plan.items() if found == kind]

    def _kind(self, name: str, module: Quantized) -> str:
        sites = _sites(module)
        n, k = sites[0].rows_out, sum(site.rows_in for site in sites)
        if not isinstance(module, nn.Linear):
            return "1×1 convolutions"
        if len({site.site.kind for site in sites}) > 1 or len({site.site.format for site in sites}) > 1:
            return "linears in parts of several kinds"
        if not sites[0].site.has_smooth:
            fits = len(sites) == 1 and n % AWQ_ROWS == 0 and k % AWQ_COLUMNS == 0
            return "w4a16" if fits else "W4A16 linears of sizes that it cannot hold"
        group = GROUPS.get(sites[0].site.format)
        if any(site.site.group != group for site in sites):
            return "W4A4 linears in other formats or groups"
        if n % CHANNELS or k % CHANNELS or any(site.rows_in % group for site in sites):
            return "W4A4 linears of sizes that it cannot hold"
        if sites[0].site.format == "nvfp4" and any(_unlike(sites[0], site) for site in sites[1:]):
            return "NVFP4 linears in parts, each with channel scales of its own"
        return "w4a4"

    def _format(self) -> str:
        formats = {_sites(self.quantized[name])[0].site.format for name in self._of("w4a4")}
        if len(formats) > 1:
            raise NunchakuError("linears are in int4 and in nvfp4: a nunchaku_lite folder has one of them")
        if not formats and not self._of("w4a16"):
            raise NunchakuError(f"{type(self.model).__name__}: none of its quantized linears has a size and format "
                                "that nunchaku_lite knows")
        return next(iter(formats), "int4")

    def _rank(self, name: str) -> int:
        return sum(site.site.rank for site in _sites(self.quantized[name]))

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = {"quant_method": QUANT_METHOD, "compute_dtype": dtype_name(self.dtype)}
        w4a4, w4a16 = self._of("w4a4"), self._of("w4a16")
        if w4a4:
            found[W4A4] = {"precision": self.format, "group_size": GROUPS[self.format], "rank": self.rank,
                           "targets": w4a4}
        if w4a16:
            found[W4A16] = {"precision": "int4", "group_size": AWQ_GROUP, "targets": w4a16}
        smaller = {name: self._rank(name) for name in w4a4 if self._rank(name) < self.rank}
        if smaller:
            found[OWN] = {"ranks": smaller}
        return {**config_of(self.model), "quantization_config": found}

    # ------------------------------------------------------------------------------------------------------- tensors
    def layout(self) -> Shapes:
        """Name → (shape, dtype) of every tensor."""
        found = {f"{name}.{leaf}": shape for name in self.plan for leaf, shape in self._shapes(name).items()}
        return found | {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._others()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same names, with the tensors; made one linear at a time."""
        for name, kind in self.plan.items():
            make = {"w4a4": self._w4a4, "w4a16": self._w4a16}.get(kind, self._dense)
            if any(site.site.divided for site in _sites(self.quantized[name])):
                self.notes.add("linears whose smoothing was moved, which such folders cannot say: LoRAs will be off", 0)
            yield from ((f"{name}.{leaf}", tensor.cpu()) for leaf, tensor in make(name).items())
        yield from self._others()

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        inside = tuple(f"{name}." for name in self.plan)
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(inside):
                yield name, tensor.cpu().contiguous()

    def _shapes(self, name: str) -> Shapes:
        sites, kind = _sites(self.quantized[name]), self.plan[name]
        n, k = sites[0].rows_out, sum(site.rows_in for site in sites)
        bias = {"bias": ((n,), self.dtype)} if self._has_bias(name) else {}
        if kind not in ("w4a4", "w4a16"):
            return {"weight": (tuple(self.empty.get_submodule(name).weight.shape), self.dtype), **bias}
        if kind == "w4a16":
            scales = ((k // AWQ_GROUP, n), self.dtype)
            return {"qweight": ((n // 4, k // 2), torch.int32), "wscales": scales, "wzeros": scales, **bias}
        found = shapes_w4a4(sites[0].site, n, k, self.rank, LONG, self.dtype)
        found = {leaf: shape for leaf, shape in found.items() if leaf not in ("bias", LONG["smooth_orig"])} | bias
        if self.format == "nvfp4":
            found |= {"wcscales": ((n,), self.dtype), "wtscale": ((1,), self.dtype)}
        return found

    def _w4a4(self, name: str) -> dict[str, Tensor]:
        """Parts as one: codes, scales and smooth side by side, and each reads the raw input with ranks of its own."""
        sites = _sites(self.quantized[name])
        weights = [site.qtensor() for site in sites]
        branches = [site for site in sites if site.site.rank]
        linear = Linear(self.format, GROUPS[self.format], sum(site.rows_in for site in sites),
                        torch.cat([weight.codes for weight in weights], 1), _beside([w.scales for w in weights]),
                        channel_scale=weights[0].channel_scale, smooth=torch.cat([site.smooth.data for site in sites]))
        if branches:
            linear.down = _diagonal(sites, self.dtype)
            linear.up = torch.cat([site.up.data for site in branches], 1)
        linear.bias = self._bias(name)
        found = packed_w4a4(linear, self.rank, LONG, self.dtype)
        del found[LONG["smooth_orig"]]
        if linear.bias is None:
            del found["bias"]
        return found | (self._second_scales(linear.channel_scale) if self.format == "nvfp4" else {})

    def _second_scales(self, scale: Tensor) -> dict[str, Tensor]:
        """A scale for every channel, and one for all: a power of two, where the range of 16 bit is a small one."""
        top = scale.abs().max().item()
        common = 2.0 ** min(max(frexp(top)[1], -24), 15) if top and self.dtype == torch.float16 else 1.0
        stored = (scale / common).to(self.dtype)
        note_scales(scale, stored.float() * common, self.notes)
        return {"wcscales": packing.pack_vector(stored, 1), "wtscale": torch.full((1,), common, dtype=self.dtype)}

    def _w4a16(self, name: str) -> dict[str, Tensor]:
        site = self.quantized[name]
        weight = site.qtensor()
        if weight.format not in (INT4, UINT4):
            weight = rounded_again(weight, INT4, self.dtype, self.notes)
        linear = Linear(weight.format.name, AWQ_GROUP, weight.k, weight.codes, weight.scales, weight.zeros)
        try:
            linear = as_unsigned(linear)
        except NunchakuError as error:
            raise NunchakuError(f"{name}: {error}") from error
        groups, bias = weight.k // AWQ_GROUP, self._bias(name)
        found = {"qweight": packing.pack_awq_codes(linear.codes, torch.int32),
                 "wscales": packing.pack_awq_scales(linear.scales, groups),
                 "wzeros": packing.pack_awq_scales(linear.zeros, groups)}
        return found if bias is None else {**found, "bias": bias}

    def _dense(self, name: str) -> dict[str, Tensor]:
        exact = torch.cat([site.weight_with(None) for site in _sites(self.quantized[name])], 1)
        weight, bias = exact.to(self.dtype), self._bias(name)
        change = ((weight.float() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        self.notes.add(f"{self.plan[name]}, written in 16 bit (relative)", change)
        found = {"weight": weight.reshape(self.empty.get_submodule(name).weight.shape)}
        return found if bias is None else {**found, "bias": bias}

    # -------------------------------------------------------------------------------------------------------- biases
    def _has_bias(self, name: str) -> bool:
        return self.empty.get_submodule(name).bias is not None

    def _rounded(self, bias: Tensor) -> Tensor:
        found = bias.to(self.dtype)
        note_bias(bias, found, self.notes)
        return found

    def _bias(self, name: str) -> Tensor | None:
        """Without the correction of a shift, as nothing is shifted in such folders."""
        module = self.quantized[name]
        shifted = [site for site in _sites(module) if site.site.shift]
        bias = None if module.bias is None else module.bias.data
        for site in shifted:
            bias = bias.float() + site.correction()
            self.notes.add("linears whose inputs were shifted before they became 4 bit, and no longer are", 0)
        if self._has_bias(name):
            return None if bias is None else self._rounded(bias)
        left = 0.0 if bias is None else bias.float().abs().max().item()
        if left > _NEGLIGIBLE * sum(site.correction().abs().max().item() for site in shifted):
            raise NunchakuError(f"{name}: has a bias, and that of {type(self.model).__name__} has none")
        return None


def write_lite(model: nn.Module, folder: Path) -> Notes:
    """Write config.json and the tensors into a folder; says what could not be kept bit for bit."""
    with torch.device("cpu"):  # whatever torch's default is
        writer = LiteWriter(model)
        layout, config = writer.layout(), writer.config()
        writer.notes = Notes()
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / FILE, layout, writer.tensors(), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return writer.notes


def _sites(module: Quantized) -> list[QuantizedSite]:
    return list(module.parts) if isinstance(module, SplitLinear) else [module]


def _empty(model: nn.Module) -> nn.Module:
    """The model as its configuration makes it, without data: tells which linears have a bias."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return type(model).from_config(config_of(model))


def _unlike(one: QuantizedSite, other: QuantizedSite) -> bool:
    return not torch.equal(one.channel_scale.data, other.channel_scale.data)


def _beside(scales: list[Tensor]) -> Tensor:
    """Through bytes: not every operation knows 8-bit floats."""
    kind = torch.uint8 if scales[0].dtype == torch.float8_e4m3fn else scales[0].dtype
    return torch.cat([part.view(kind) for part in scales], 1).view(scales[0].dtype)


def _diagonal(sites: list[QuantizedSite], dtype: torch.dtype) -> Tensor:
    """`down` (Σ ranks, Σ inputs): each part's ranks read its own inputs."""
    out = torch.zeros(sum(site.site.rank for site in sites), sum(site.rows_in for site in sites), dtype=dtype)
    row = column = 0
    for site in sites:
        rank = site.site.rank
        if rank:
            out[row:row + rank, column:column + site.rows_in] = site.down.data
        row, column = row + rank, column + site.rows_in
    return out
