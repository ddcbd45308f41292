"""The packed linears of Nunchaku's files and of nunchaku_lite folders, from their headers alone."""
from __future__ import annotations

import json
from typing import NamedTuple

from ..checkpoint.headers import Header, TensorHeader
from ..errors import NunchakuError
from .tables import size

PACKED = ".qweight"
_RANKS = ("lora_down", "proj_down")


class PackedLinear(NamedTuple):
    name: str
    kind: str
    format: str
    rank: int
    n: int  # as stored: padded
    k: int
    nbytes: int

    def row(self) -> tuple[str, ...]:
        return (self.name, self.kind, self.format, str(self.rank), str(self.n), str(self.k), str(self.nbytes))


def packed_linears(label: str, header: Header) -> list[PackedLinear]:
    nbytes: dict[str, int] = {}
    for name, tensor in header.tensors.items():
        module = name.rpartition(".")[0]
        nbytes[module] = nbytes.get(module, 0) + tensor.nbytes
    names = (name.removesuffix(PACKED) for name in header.tensors if name.endswith(PACKED))
    return [_linear(label, name, header.tensors, nbytes[name]) for name in names]


def _linear(label: str, name: str, tensors: dict[str, TensorHeader], nbytes: int) -> PackedLinear:
    codes = tensors[name + PACKED]
    if len(codes.shape) != 2 or codes.dtype not in ("I8", "I16", "I32"):
        raise NunchakuError(f"{label}: {name}{PACKED}: expected a matrix of I8, I16 or I32, "
                            f"got {codes.shape} {codes.dtype}")
    if codes.dtype != "I8":
        wide = codes.dtype == "I32"
        n, k = 4 * codes.shape[0], codes.shape[1] * (2 if wide else 1)
        return PackedLinear(name, "w4a16", f"uint4 g{64 if wide else 128}", 0, n, k, nbytes)
    scales = tensors.get(f"{name}.wscales")
    if scales is None:
        raise NunchakuError(f"{label}: {name}.wscales is missing")
    fmt = "nvfp4 g16" if scales.dtype == "F8_E4M3" else "int4 g64"
    down = next((tensors[key] for leaf in _RANKS if (key := f"{name}.{leaf}") in tensors), None)
    rank = down.shape[1] if down is not None and len(down.shape) == 2 else 0
    return PackedLinear(name, "w4a4", fmt, rank, codes.shape[0], 2 * codes.shape[1], nbytes)


def title(label: str, header: Header, config: dict) -> str:
    """What the file says it is."""
    cls = header.metadata.get("model_class") or config.get("_class_name") or "a model that it does not name"
    return f"{label}: {cls}, an SVDQuant model as Nunchaku packs it{_method(header)}"


def _method(header: Header) -> str:
    try:
        found = json.loads(header.metadata["quantization_config"])
        return f" ({found['method']} {found['weight']['dtype']})"
    except (KeyError, TypeError, ValueError):
        return ""


def totals(linears: list[PackedLinear], header: Header) -> list[str]:
    packed = sum(linear.nbytes for linear in linears)
    whole = sum(tensor.nbytes for tensor in header.tensors.values())
    return [f"quantized: {len(linears)} packed linears, {size(packed)}", f"in 16 bit: {size(whole - packed)}",
            f"total: {size(whole)}"]
