"""One linear of Nunchaku's files, all its tensors: as the file packs them, and in rows.

    W4A4   qweight int8 (N, K/2) · wscales (G, N) · [wtscale (1)] · [wcscales (N)] · bias (N) · smooth (K)
           [smooth_orig (K)] · lora_down (K, R) · lora_up (N, R)        N and K padded to 128, R to 16
    W4A16  qweight int32 (n/4, k/2) · wscales, wzeros (G, n) · bias (n), in groups of 64; of text encoders int16
           (n/4, k) · scales, scaled_zeros (G, n), in groups of 128
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import NunchakuError
from ...formats import group_count
from ...module_tools import dtype_name
from ...site import Site
from ..headers import TensorHeader
from . import packing
from .layouts import CHANNELS, RANKS, whole

SHORT = {"smooth": "smooth", "smooth_orig": "smooth_orig", "down": "lora_down", "up": "lora_up"}
LONG = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "down": "proj_down", "up": "proj_up"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = FLOATS[:2]
GROUPS = {"int4": 64, "nvfp4": 16}
AWQ_GROUP, TEXT_GROUP = 64, 128
_AWQ_LEAVES = {False: ("wscales", "wzeros"), True: ("scales", "scaled_zeros")}  # True: of text encoders
_IN_LONG = {short: LONG[name] for name, short in SHORT.items()}


@dataclass
class Linear:
    """All rows of one linear, and what its file says of it. Which tensors there are depends on the format."""

    format: str  # "int4", "nvfp4", "uint4"
    group: int
    k: int
    codes: Tensor  # uint8 (n, ceil(k/2))
    scales: Tensor  # (n, G)
    zeros: Tensor | None = None
    channel_scale: Tensor | None = None  # (n) fp32
    smooth: Tensor | None = None  # (k); None: W4A16
    divisor: Tensor | None = None  # (k): the input arrives divided by it
    down: Tensor | None = None  # (r, k)
    up: Tensor | None = None  # (n, r)
    bias: Tensor | None = None  # (n)

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> Linear:
        """The same with its rows changed: reordered, or some of them."""
        rows = {name: change(tensor) for name in ("codes", "scales", "zeros", "channel_scale", "up", "bias")
                if (tensor := getattr(self, name)) is not None}
        return Linear(**{**vars(self), **rows})


class Tensors:
    """The tensors of the linear `name`, by leaf, checked as they are read."""

    def __init__(self, read: Callable[[str], Tensor], names: Mapping[str, TensorHeader], name: str, source: str
                 ) -> None:
        self._read, self._names, self.name, self.source = read, names, name, source
        self.used: list[str] = []

    def __contains__(self, leaf: str) -> bool:
        return self._key(leaf) in self._names

    def _key(self, leaf: str) -> str:
        key = f"{self.name}.{leaf}"
        other = f"{self.name}.{_IN_LONG.get(leaf, leaf)}"
        return other if other in self._names else key

    def axes(self, leaf: str) -> int | None:
        header = self._names.get(self._key(leaf))
        return None if header is None else len(header.shape)

    def get(self, leaf: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """None in a shape: any size."""
        key = self._key(leaf)
        if key not in self._names:
            raise NunchakuError(f"{self.source}: {key} is missing")
        tensor = self._read(key)
        fits = tensor.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape,
                                                                                          strict=True))
        if not fits or tensor.dtype not in dtypes:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            names = " or ".join(map(dtype_name, dtypes))
            raise NunchakuError(f"{self.source}: {key}: expected ({wanted}) {names}, "
                                f"got {tuple(tensor.shape)} {dtype_name(tensor.dtype)}")
        self.used.append(key)
        return tensor

    def optional(self, leaf: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
        return self.get(leaf, shape, dtypes) if leaf in self else None


def kind_of(tensors: Tensors) -> str:
    """"w4a4" or "w4a16"."""
    return "w4a16" if "wzeros" in tensors or "scaled_zeros" in tensors else "w4a4"


# ------------------------------------------------------------------------------------------------------------- reading
def read_w4a4(tensors: Tensors, n: int, k: int) -> Linear:
    rows, columns = whole(n, CHANNELS), whole(k, CHANNELS)
    codes = packing.unpack_codes(tensors.get("qweight", (rows, columns // 2), (torch.int8,)), n, k)
    packed = tensors.get("wscales", (None, rows), (*HALVES, torch.float8_e4m3fn))
    fmt = "nvfp4" if packed.dtype == torch.float8_e4m3fn else "int4"
    if packed.shape[0] != columns // GROUPS[fmt]:
        raise NunchakuError(f"{tensors.source}: {tensors.name}.wscales: expected ({columns // GROUPS[fmt]}, {rows}), "
                            f"got {tuple(packed.shape)}")
    linear = Linear(fmt, GROUPS[fmt], k, codes, packing.unpack_scales(packed, n, group_count(k, GROUPS[fmt])))
    linear.channel_scale = _channel_scale(tensors, n, rows) if fmt == "nvfp4" else None
    linear.bias = _vector(tensors, "bias", n)
    linear.smooth, linear.divisor = _smooth(tensors, k)
    linear.down, linear.up = _branch(tensors, n, k)
    return linear


def _channel_scale(tensors: Tensors, n: int, rows: int) -> Tensor:
    whole_tensor = tensors.optional("wtscale", () if tensors.axes("wtscale") == 0 else (1,), FLOATS)
    scale = torch.ones(n) if whole_tensor is None else whole_tensor.float().reshape(1).expand(n)
    channels = tensors.optional("wcscales", (rows,), FLOATS)
    return scale.clone() if channels is None else scale * packing.unpack_vector(channels, n).float()


def _vector(tensors: Tensors, leaf: str, size: int) -> Tensor | None:
    packed = tensors.optional(leaf, (whole(size, CHANNELS),), FLOATS)
    return None if packed is None else packing.unpack_vector(packed, size)


def _smooth(tensors: Tensors, k: int) -> tuple[Tensor, Tensor | None]:
    """(smooth, what it was before it was fused into the layer that makes the input, or None)."""
    smooth = packing.unpack_vector(tensors.get("smooth", (whole(k, CHANNELS),), HALVES), k)
    original = _vector(tensors, "smooth_orig", k)
    fused = original is not None and bool((smooth == 1).all()) and not bool((original == 1).all())
    return smooth, original.to(smooth.dtype) if fused else None


def _branch(tensors: Tensors, n: int, k: int) -> tuple[Tensor | None, Tensor | None]:
    if "lora_down" not in tensors and "lora_up" not in tensors:
        return None, None
    down = tensors.get("lora_down", (whole(k, CHANNELS), None), HALVES)
    rank = down.shape[1]
    if rank % RANKS:
        raise NunchakuError(f"{tensors.source}: {tensors.name}: expected a rank that is a multiple of {RANKS}, "
                            f"got {rank}")
    up = tensors.get("lora_up", (whole(n, CHANNELS), rank), HALVES)
    if not rank:
        return None, None
    return packing.unpack_down(down, k, rank), packing.unpack_up(up, n, rank)


def read_w4a16(tensors: Tensors, n: int, k: int) -> Linear:
    if "scaled_zeros" in tensors:
        return _read_awq(tensors, n, k, TEXT_GROUP)
    return _read_awq(tensors, n, k, AWQ_GROUP)


def _read_awq(tensors: Tensors, n: int, k: int, group: int) -> Linear:
    if not packing.awq_fits(n, k, group):
        raise NunchakuError(f"{tensors.source}: {tensors.name}: a linear of {k} inputs and {n} outputs cannot be held "
                            f"in groups of {group}")
    shape, dtype = ((n // 4, k), torch.int16) if group == TEXT_GROUP else ((n // 4, k // 2), torch.int32)
    codes = packing.unpack_awq_codes(tensors.get("qweight", shape, (dtype,)), n, k)
    leaves = _AWQ_LEAVES[group == TEXT_GROUP]
    scales, zeros = (tensors.get(leaf, (None, n), HALVES) for leaf in leaves)
    for leaf, found in zip(leaves, (scales, zeros), strict=True):
        if found.shape[0] not in (k // group, packing.awq_groups(k, group)) or found.dtype != scales.dtype:
            raise NunchakuError(f"{tensors.source}: {tensors.name}.{leaf}: expected ({k // group}, {n}) "
                                f"{dtype_name(scales.dtype)}, or as many rows as its kernels read, "
                                f"{packing.awq_groups(k, group)}; got {tuple(found.shape)} {dtype_name(found.dtype)}")
    scales, zeros = (packing.unpack_awq_scales(found, n, k // group) for found in (scales, zeros))
    linear = Linear("uint4", group, k, codes, scales, zeros, bias=tensors.optional("bias", (n,), FLOATS))
    return as_signed(linear) if group == AWQ_GROUP else linear


# ------------------------------------------------------------------------------------ W4A16: signed codes and unsigned
def as_signed(linear: Linear) -> Linear:
    """Codes −8 … 7 without zeros, where every zero is −8 scales, bit for bit, as `as_unsigned` writes them."""
    zeros = linear.scales * -8
    if not torch.equal(zeros.view(torch.int16), linear.zeros.view(torch.int16)):
        return linear
    return Linear(**{**vars(linear), "format": "int4", "zeros": None, "codes": linear.codes ^ 0x88})


def as_unsigned(linear: Linear) -> Linear:
    """Codes 0 … 15 with a zero for each group: −8 scales are exact in 16 bit, if they are finite."""
    if linear.format == "uint4":
        return linear
    zeros = linear.scales * -8
    if not zeros.isfinite().all():
        raise NunchakuError("a scale is too large to be held with a zero of -8 scales")
    return Linear(**{**vars(linear), "format": "uint4", "zeros": zeros, "codes": linear.codes ^ 0x88})


# ------------------------------------------------------------------------------------------------------------- writing
def packed_w4a4(linear: Linear, rank: int, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaf → tensor. rank: of the file, the same for every linear."""
    n, k = linear.codes.shape[0], linear.k
    ones = torch.ones(k, dtype=dtype)
    smooth = linear.smooth if linear.divisor is None else linear.divisor
    down = _with_ranks(linear.down, (rank, k), dtype)
    up = _with_ranks(linear.up, (n, rank), dtype)
    bias = torch.zeros(n, dtype=dtype) if linear.bias is None else linear.bias.to(dtype)
    found = {"qweight": packing.pack_codes(linear.codes, k),
             "wscales": packing.pack_scales(linear.scales, packing.padded_groups(k, linear.group)),
             "bias": packing.pack_vector(bias, 1),
             names["smooth_orig"]: packing.pack_vector(smooth, 1),
             names["smooth"]: packing.pack_vector(smooth if linear.divisor is None else ones, 1),
             names["down"]: packing.pack_down(down, rank), names["up"]: packing.pack_up(up, rank)}
    return found


def _with_ranks(factor: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The factor with as many ranks as `shape` has, the last of them zeros."""
    out = torch.zeros(shape, dtype=dtype)
    if factor is not None:
        out[:factor.shape[0], :factor.shape[1]] = factor
    return out


def packed_w4a16(linear: Linear) -> dict[str, Tensor]:
    linear = as_unsigned(linear)
    groups = packing.awq_groups(linear.k, linear.group)
    text = linear.group == TEXT_GROUP
    leaves = _AWQ_LEAVES[text]
    found = {"qweight": packing.pack_awq_codes(linear.codes, torch.int16 if text else torch.int32),
             leaves[0]: packing.pack_awq_scales(linear.scales, groups),
             leaves[1]: packing.pack_awq_scales(linear.zeros, groups)}
    return found if linear.bias is None else {**found, "bias": linear.bias}


# ------------------------------------------------------------------------------------------- shapes of what is written
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def shapes_w4a4(site: Site, n: int, k: int, rank: int, names: Mapping[str, str], dtype: torch.dtype) -> Shapes:
    rows, columns = whole(n, CHANNELS), whole(k, CHANNELS)
    scale_dtype = site.weight_format.scale_dtype(dtype)
    return {"qweight": ((rows, columns // 2), torch.int8), "wscales": ((columns // site.group, rows), scale_dtype),
            "bias": ((rows,), dtype), names["smooth"]: ((columns,), dtype), names["smooth_orig"]: ((columns,), dtype),
            names["down"]: ((columns, rank), dtype), names["up"]: ((rows, rank), dtype)}


def shapes_w4a16(group: int, n: int, k: int, bias: bool, dtype: torch.dtype) -> Shapes:
    text = group == TEXT_GROUP
    scales = ((packing.awq_groups(k, group), n), dtype)
    found = {"qweight": ((n // 4, k), torch.int16) if text else ((n // 4, k // 2), torch.int32),
             **dict.fromkeys(_AWQ_LEAVES[text], scales)}
    return {**found, "bias": ((n,), dtype)} if bias else found
