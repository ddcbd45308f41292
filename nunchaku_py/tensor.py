"""QTensor: a quantized weight matrix in its canonical form, as it stands on disk; and the search for its scales."""
from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from . import formats
from .errors import NunchakuError
from .formats import INT8, Format, group_count, grouped, round_scale, row_chunks

SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75)  # of absmax/7: clipping the largest weight a little serves the others
E4M3_STEPS = (0, 1, 2, 3, 4, 5, 6, -1)  # neighbours of e4m3(absmax/6); absmax/4 is four to six steps up
E4M3_LARGEST = 0x7E
ROW_TOP = 4 * 448.0  # a row's largest weight over its channel_scale: leaves e4m3 scales room for absmax/4


@dataclass(frozen=True, eq=False)
class QTensor:
    """w (N,K) ≈ code·scale (+ zero) (·channel_scale)."""

    codes: Tensor  # uint8 (N, ceil(K/2)), even k in the low nibble
    scales: Tensor  # (N, G): 16 bit, nvfp4: float8_e4m3fn
    format: Format
    k: int
    zeros: Tensor | None = None  # uint4: (N, G) 16 bit
    channel_scale: Tensor | None = None  # nvfp4: (N) fp32

    def __post_init__(self) -> None:
        fmt, n, groups = self.format, self.codes.shape[0], group_count(self.k, self.format.group)
        if not fmt.packed:
            raise NunchakuError("QTensor: holds 4-bit formats, got int8, which is made from them by fold_int8()")
        _expect("codes", "(out, ceil(in/2))", self.codes, (n, -(-self.k // 2)), torch.uint8)
        _expect("scales", "(out, groups)", self.scales, (n, groups), fmt.scale_dtype(self.scales.dtype))
        _expect("zeros", "(out, groups)", self.zeros, (n, groups) if fmt.name == "uint4" else None)
        _expect("channel_scale", "(out)", self.channel_scale, (n,) if fmt.name == "nvfp4" else None, torch.float32)

    @staticmethod
    def quantize(w: Tensor, fmt: Format, scale_dtype: torch.dtype = torch.bfloat16, search: bool = True) -> QTensor:
        """The nearest QTensor to w (N,K).

        search=False: scale = absmax/7 (int4), e4m3(absmax/6) (nvfp4), (max − min)/15 (uint4, zero = min).
        search=True: per group the one of several stored scales, that one among them, with the least squared error.
        """
        if not fmt.packed:
            raise NunchakuError(f"QTensor.quantize: expected a 4-bit format, got {fmt.name}")
        parts: dict[str, list[Tensor]] = {}
        for rows in row_chunks(*w.shape):
            x, params = _fit(_rows(w, rows), fmt, scale_dtype, search)
            params["codes"] = formats.pack_nibbles(formats.encode(x, params["scales"], fmt))
            for name, part in params.items():
                parts.setdefault(name, []).append(part)
        if not parts:
            return _empty(w, fmt, scale_dtype)
        return QTensor(format=fmt, k=w.shape[1], **{name: torch.cat(part) for name, part in parts.items()})

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.k

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those this format has not."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in found.items() if isinstance(t, Tensor)}

    def to(self, device: torch.device | str) -> QTensor:
        return replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    def unpacked(self) -> Tensor:
        """Codes int8 (N,K)."""
        return formats.unpack_nibbles(self.codes, self.k, signed=self.format.name == "int4")

    def dequantize(self) -> Tensor:
        """fp32 (N,K)."""
        return formats.decode(self.unpacked(), self.scales, self.format, self.zeros, self.channel_scale)

    def fold_int8(self) -> tuple[Tensor, Tensor]:
        """w8 (N,K) int8 and s_ch (N) fp32 with w ≈ w8·s_ch."""
        return formats.fold_int8(self.unpacked(), self.scales, self.format, self.zeros, self.channel_scale)


def fake_quantize(
    w: Tensor, fmt: Format, scale_dtype: torch.dtype = torch.bfloat16, search: bool = False, out: Tensor | None = None
) -> Tensor:
    """QTensor.quantize(w, …).dequantize(), without making codes; `out` (fp32, may be w itself) saves the copy."""
    out = torch.empty(w.shape, dtype=torch.float32, device=w.device) if out is None else out
    for rows in row_chunks(*w.shape):
        x, params = _fit(_rows(w, rows), fmt, scale_dtype, search)
        scales = params["scales"].float()
        formats.div_groups_(x, scales.masked_fill(scales == 0, torch.inf), fmt.group)
        formats.mul_groups_(formats.round_codes_(x, fmt), scales, fmt.group)
        if "zeros" in params:
            _add_groups_(x, params["zeros"].float(), fmt.group)
        if "channel_scale" in params:
            x.mul_(params["channel_scale"].unsqueeze(-1))
        out[rows] = x
    return out


def _rows(w: Tensor, rows: slice) -> Tensor:
    """A contiguous fp32 copy of some rows; refuses what no scale can hold."""
    x = w[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not x.sum().isfinite() and not x.isfinite().all():
        row = rows.start + int((~x.isfinite()).any(1).nonzero()[0])
        raise NunchakuError(f"weight: expected finite numbers, row {row} of {tuple(w.shape)} holds NaN or an infinity")
    return x


def _fit(x: Tensor, fmt: Format, scale_dtype: torch.dtype, search: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """x as its codes see it (zeros, channel scales taken off, in place), and what is stored: scales, zeros, …"""
    params: dict[str, Tensor] = {}
    if fmt.name == "uint4":
        params["zeros"] = _group_min(x, fmt.group).to(scale_dtype)
        _add_groups_(x, -params["zeros"].float(), fmt.group)
    if fmt.name == "nvfp4":
        params["channel_scale"] = _channel_scale(x)
        x.div_(params["channel_scale"].unsqueeze(-1))
    top = formats.group_top(x, fmt) / fmt.top
    params["scales"] = _search(x, top, fmt, scale_dtype) if search else round_scale(top, fmt.scale_dtype(scale_dtype))
    return x, params


def _channel_scale(x: Tensor) -> Tensor:
    """Second-level scale (N) of nvfp4, rounded to what bf16 holds; 1 for a row of zeros."""
    top = formats.group_top(x, INT8)[:, 0]
    scale = (top / ROW_TOP).clamp_min_(torch.finfo(torch.bfloat16).tiny).bfloat16().float()
    return scale.masked_fill_(top == 0, 1.0)


def _group_min(x: Tensor, group: int) -> Tensor:
    out = x.new_zeros(x.shape[0], group_count(x.shape[1], group))
    for block, columns in grouped(x, group):
        out[:, columns] = block.amin(-1)
    return out


def _add_groups_(x: Tensor, values: Tensor, group: int) -> None:
    for block, columns in grouped(x, group):
        block.add_(values[:, columns].unsqueeze(-1))


def _candidates(top: Tensor, fmt: Format, scale_dtype: torch.dtype):
    """Stored scales worth trying, the plain one first."""
    if fmt.name != "nvfp4":
        yield from (round_scale(top * shrink, scale_dtype) for shrink in SHRINK)
        return
    code = round_scale(top, torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    for step in E4M3_STEPS:  # e4m3 codes are ordered as the numbers they stand for
        yield (code + step).clamp_(0, E4M3_LARGEST).to(torch.uint8).view(torch.float8_e4m3fn)


def _search(x: Tensor, top: Tensor, fmt: Format, scale_dtype: torch.dtype) -> Tensor:
    """Stored scales (N,G): for every group the candidate with the least squared error, the earlier one of equals."""
    best = least = None
    trial = torch.empty_like(x)
    for scales in _candidates(top, fmt, scale_dtype):
        error = _squared_error(x, scales.float(), fmt, trial)
        if best is None:
            best, least = scales.clone(), error
            continue
        better = error < least
        best = torch.where(better, scales.float(), best.float()).to(best.dtype)
        least = torch.minimum(error, least)
    return best


def _squared_error(x: Tensor, scales: Tensor, fmt: Format, trial: Tensor) -> Tensor:
    divisor = scales.masked_fill(scales == 0, torch.inf)
    formats.div_groups_(trial.copy_(x), divisor, fmt.group)
    formats.mul_groups_(formats.round_codes_(trial, fmt), scales, fmt.group)
    return formats.sum_groups(trial.sub_(x).square_(), fmt.group)


def _empty(w: Tensor, fmt: Format, scale_dtype: torch.dtype) -> QTensor:
    """No rows."""
    k, groups = w.shape[1], group_count(w.shape[1], fmt.group)
    new = {"codes": w.new_empty((0, -(-k // 2)), dtype=torch.uint8)}
    new["scales"] = w.new_empty((0, groups), dtype=fmt.scale_dtype(scale_dtype))
    if fmt.name == "uint4":
        new["zeros"] = w.new_empty((0, groups), dtype=scale_dtype)
    if fmt.name == "nvfp4":
        new["channel_scale"] = w.new_empty(0, dtype=torch.float32)
    return QTensor(format=fmt, k=k, **new)


def _expect(
    name: str, meaning: str, tensor: Tensor | None, shape: tuple | None, dtype: torch.dtype | None = None
) -> None:
    if shape is None and tensor is None:
        return
    if shape is None:
        raise NunchakuError(f"{name}: this format has none, got {tuple(tensor.shape)} {tensor.dtype}")
    if tensor is None or tensor.shape != shape or (dtype and tensor.dtype != dtype):
        got = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
        raise NunchakuError(f"{name}: expected {meaning} = {shape} {dtype or '16 bit'}, got {got}")
