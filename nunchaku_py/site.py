"""What a file says of one quantized linear, and what follows from it: tensor shapes, activation formats, modes.

    y = Q((x+S)/smooth) · Q(R)ᵀ + (x·downᵀ)·upᵀ + bias        (S = 0 unless the site is shifted)
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch

from .backends import cuda
from .errors import NunchakuError
from .formats import Format, format_of, group_count
from .ops import ActSpec, LinearSpec, linear_w4a16
from .ops.registry import forced_backend, own_choice
from .ops.spec import MMA
from .tensor import QTensor

Kind = Literal["w4a4", "w4a16"]
Mode = Literal["a4", "a8", "a16"]
Divided = Literal["", "input", "output"]  # by the smoothing of a later layer: see division.py
MODES: tuple[Mode, ...] = ("a4", "a8", "a16")
WEIGHTS = ("int8", "int4")  # how mode a8 may hold them on a GPU
# Of an a8 site's weights: INT8 beside the codes; the codes and the scales that rows fold to; the codes alone. Of an a4
# site's: the codes alone, or with scales in the layout of the CUDA kernels.
Residency = Literal["folded", "scaled", "codes", "mma"]


class Packing(NamedTuple):
    """What a site's derived tensors are for."""

    mode: Mode
    residency: Residency
    device: str  # its type
    dtype: torch.dtype | None  # of the rows; None where any will do


class QuantizedInput(NamedTuple):
    """Codes, scales and low-rank hidden state of one input; sites of a group share it."""

    qx: torch.Tensor
    sx: torch.Tensor
    h: torch.Tensor


@dataclass(frozen=True)
class Site:
    """The static description of one quantized linear, as `config.json` holds it."""

    kind: Kind
    format: str
    group: int
    rank: int = 0
    shift: float = 0.0
    unsigned_act: bool = False
    divided: Divided = ""

    def __post_init__(self) -> None:
        if self.kind not in ("w4a4", "w4a16"):
            raise NunchakuError(f"site: kind is 'w4a4' or 'w4a16', not {self.kind!r}")
        if self.format not in ("int4", "uint4", "nvfp4"):
            raise NunchakuError(f"site: format is 'int4', 'uint4' or 'nvfp4', not {self.format!r}")
        if type(self.group) is not int or type(self.rank) is not int or self.group < 1 or self.rank < 0:
            raise NunchakuError(f"site: group must be an integer above 0 and rank one from 0 on, "
                                f"got {self.group!r} and {self.rank!r}")
        if type(self.shift) not in (int, float) or not math.isfinite(self.shift) or type(self.unsigned_act) is not bool:
            raise NunchakuError(f"site: shift must be a finite number and unsigned_act true or false, "
                                f"got {self.shift!r} and {self.unsigned_act!r}")
        if (self.shift or self.unsigned_act) and (self.kind, self.format) != ("w4a4", "int4"):
            raise NunchakuError(f"site: only w4a4 int4 sites are shifted or unsigned, not {self.kind} {self.format}")
        if self.divided not in ("", "input", "output"):
            raise NunchakuError(f"site: divided is '', 'input' or 'output', not {self.divided!r}")
        if self.divided and self.kind != "w4a4":
            raise NunchakuError(f"site: only w4a4 sites are divided, not {self.kind}")

    @staticmethod
    def from_json(data: dict[str, Any]) -> Site:
        unknown = set(data) - {field.name for field in fields(Site)}
        if unknown:
            raise NunchakuError(f"site: unknown fields {sorted(unknown)}")
        missing = {"kind", "format", "group"} - set(data)
        if missing:
            raise NunchakuError(f"site: missing fields {sorted(missing)}")
        return Site(**data)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that files stay readable."""
        defaults = {"shift": 0.0, "unsigned_act": False, "divided": ""}
        return {key: value for key, value in asdict(self).items() if key not in defaults or value != defaults[key]}

    @property
    def weight_format(self) -> Format:
        return format_of(self.format, self.group)

    @property
    def has_smooth(self) -> bool:
        return self.kind == "w4a4"

    def tensors(self, n: int, k: int, bias: bool, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype) of every tensor that the site holds on disk."""
        groups = group_count(k, self.group)
        scale_dtype = torch.float8_e4m3fn if self.format == "nvfp4" else dtype
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((n, (k + 1) // 2), torch.uint8), "scales": ((n, groups), scale_dtype)}
        if self.format == "uint4":
            out["zeros"] = ((n, groups), dtype)
        if self.format == "nvfp4":
            out["channel_scale"] = ((n,), torch.float32)
        if self.has_smooth:
            out["smooth"] = ((k,), dtype)
        if self.rank:
            out["down"], out["up"] = ((self.rank, k), dtype), ((n, self.rank), dtype)
        if self.divided:
            out["divisor"] = ((k,) if self.divided == "input" else (n,), dtype)
        if bias:  # a shifted site's holds a correction that modes without a shift take off again: fp32
            out["bias"] = ((n,), torch.float32 if self.shift else dtype)
        return out

    def act_spec(self, mode: Mode) -> ActSpec:
        """How this site's input is quantized in a mode. Only a4 shifts: see FORMATS on shifted sites."""
        if self.kind == "w4a16" or mode == "a16":
            return ActSpec("none", self.group)
        if mode == "a8":
            return ActSpec("int8", 0)
        if self.format == "nvfp4":
            return ActSpec("nvfp4", self.group)
        return ActSpec("uint4" if self.unsigned_act else "int4", self.group, self.shift)

    def linear_spec(self, mode: Mode, k: int, residency: Residency = "codes") -> LinearSpec:
        act = self.act_spec(mode)
        if residency == "mma":
            return LinearSpec(self.format, self.group, k, replace(act, layout=MMA), layout=MMA)
        if act.format != "int8" or residency == "codes":
            return LinearSpec(self.format, self.group, k, act)
        if residency == "folded":
            return LinearSpec("int8", 0, k, act)
        return LinearSpec(self.format, self.group, k, act, row_scales=True)


@dataclass
class SiteTensors:
    """The canonical tensors of one site, as they are written to disk."""

    weight: QTensor
    smooth: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        found = {"codes": self.weight.codes, "scales": self.weight.scales, "zeros": self.weight.zeros,
                 "channel_scale": self.weight.channel_scale, "smooth": self.smooth,
                 "down": self.down, "up": self.up, "bias": self.bias, "divisor": self.divisor}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def auto_mode(site: Site, device: torch.device) -> Mode:
    """The activation mode a device runs fastest: 4-bit multiplications only where the hardware has them, where a kernel
    asks for them, and where they are worth it."""
    if site.kind == "w4a16":
        return "a16"
    if device.type != "cuda":
        return "a8"
    native = _native_int4 if site.format == "int4" else _native_nvfp4
    return "a4" if native(torch.cuda.get_device_capability(device)) else "a8"


def auto_weights(device: torch.device) -> str:
    """GPUs of data centers have the memory for INT8 beside the codes; elsewhere expanding costs less than it frees."""
    roomy = ((8, 0), (9, 0), (10, 0), (10, 3))
    has_room = device.type == "cuda" and torch.cuda.get_device_capability(device) in roomy
    return "int8" if has_room else "int4"


def _native_int4(capability: tuple[int, int]) -> bool:
    # Triton has no INT4: its kernels multiply the codes as INT8, group by group, which costs more than mode a8 does.
    if forced_backend() not in (None, "cuda") or cuda.refuses_gpu(capability):
        return False
    # Later GPUs emulate s4 mma, slower than s8. A100 (8.0) has it, but by count of instructions its float lanes, which
    # sum the groups, leave 45 % of 1248 TOPS at most; INT8, of whose 624 they take nothing, errs less.
    return capability in ((7, 5), (8, 6), (8, 7), (8, 9))


def _native_nvfp4(capability: tuple[int, int]) -> bool:
    return capability in ((12, 0), (12, 1))


def shift_correction(weight: QTensor, smooth: torch.Tensor, shift: float) -> torch.Tensor:
    """S·Σ_k deq(R)[n,k]/smooth[k], (N) fp32: what a shifted site's bias lacks; modes that do not shift add it back."""
    fmt, n = weight.format, weight.shape[0]
    inverse = (1.0 / smooth.float()).unsqueeze(0)
    spec = LinearSpec(fmt.name, fmt.group, weight.k, ActSpec("none", fmt.group))
    aux = next((t for t in (weight.zeros, weight.channel_scale) if t is not None), inverse.new_empty(0))
    with own_choice():  # in fp32, which kernels of GPUs do not take
        sums = linear_w4a16(inverse, inverse.new_empty(0), weight.codes, weight.scales, aux, inverse.new_empty(1, 0),
                            inverse.new_empty(n, 0), inverse.new_zeros(n), spec)
    return shift * sums[0]
