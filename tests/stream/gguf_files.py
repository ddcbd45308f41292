"""Writing GGUF files, and what their blocks mean, value by value."""
from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30


class Entry(NamedTuple):
    """shape as torch has it; data: its bytes, or how many there would be, which become a hole in the file."""

    shape: tuple[int, ...]
    kind: int
    data: bytes | int


def plain(tensor: Tensor) -> Entry:
    kind = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}[tensor.dtype]
    return Entry(tuple(tensor.shape), kind, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def q8_0(tensor: Tensor) -> tuple[Entry, Tensor]:
    """(as Q8_0, the values that it then has)"""
    groups = tensor.float().reshape(-1, 32)
    d = (groups.abs().amax(1, keepdim=True) / 127).half()
    q = (groups / d.float().clamp(min=1e-30)).round().clamp(-127, 127)
    data = torch.cat([d.view(torch.uint8), q.to(torch.int8).view(torch.uint8)], 1)
    return (Entry(tuple(tensor.shape), Q8_0, data.numpy().tobytes()),
            (d.float() * q).bfloat16().reshape(tensor.shape))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any] | None = None, version: int = 3,
          alignment: int = 32, places: Mapping[str, int] | None = None) -> Path:
    """places: where in the data tensors begin, instead of one after the other."""
    if alignment != 32:
        metadata = {**(metadata or {}), "general.alignment": alignment}
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(metadata or {}))
    head += b"".join(_text(key) + _value(value) for key, value in (metadata or {}).items())
    at, end = {}, 0
    for name, entry in entries.items():
        at[name] = (places or {}).get(name, end)
        head += _text(name) + struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1])
        head += struct.pack("<IQ", entry.kind, at[name])
        size = entry.data if isinstance(entry.data, int) else len(entry.data)
        end = max(end, -(-(at[name] + size) // alignment) * alignment)
    with open(path, "wb") as file:
        file.write(head)
        start = -(-len(head) // alignment) * alignment
        for name, entry in entries.items():
            if not isinstance(entry.data, int):
                file.seek(start + at[name])
                file.write(entry.data)
        file.truncate(start + end)
    return path


# ----------------------------------------------------------------------------- what blocks mean, by ggml's descriptions
def _fp16(block: bytes, place: int) -> float:
    return struct.unpack_from("<e", block, place)[0]


def _nibble(block: bytes, start: int, i: int, run: int) -> int:
    """Value i of nibbles where each `run` bytes hold `run` values low and then `run` values high."""
    byte = block[start + i // (2 * run) * run + i % run]
    return byte >> 4 if i % (2 * run) >= run else byte & 15


def _bit(number: int, n: int) -> int:
    return number >> n & 1


def _pair_of_6(scales: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4


def _q2(b: bytes, i: int) -> float:
    q = b[16 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
    return _fp16(b, 80) * (b[i // 16] & 15) * q - _fp16(b, 82) * (b[i // 16] >> 4)


def _q3(b: bytes, i: int) -> float:
    q = b[32 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
    q -= 0 if _bit(b[i % 32], i // 32) else 4
    j = i // 16
    low = b[96 + j] & 15 if j < 8 else b[96 + j - 8] >> 4
    return _fp16(b, 108) * ((low | (b[104 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32) * q


def _q4(b: bytes, i: int) -> float:
    scale, low = _pair_of_6(b[4:16], i // 32)
    return _fp16(b, 0) * scale * _nibble(b, 16, i, 32) - _fp16(b, 2) * low


def _q5(b: bytes, i: int) -> float:
    scale, low = _pair_of_6(b[4:16], i // 32)
    q = _nibble(b, 48, i, 32) + 16 * _bit(b[16 + i % 32], i // 32)
    return _fp16(b, 0) * scale * q - _fp16(b, 2) * low


def _q6(b: bytes, i: int) -> float:
    high = b[128 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
    scale = struct.unpack_from("<b", b, 192 + i // 16)[0]
    return _fp16(b, 208) * scale * (_nibble(b, 0, i, 64) + 16 * high - 32)


def _fifth(b: bytes, place: int, i: int) -> int:
    return 16 * _bit(struct.unpack_from("<I", b, place)[0], i)


MEANING: dict[str, Callable[[bytes, int], float]] = {
    "Q4_0": lambda b, i: _fp16(b, 0) * (_nibble(b, 2, i, 16) - 8),
    "Q4_1": lambda b, i: _fp16(b, 0) * _nibble(b, 4, i, 16) + _fp16(b, 2),
    "Q5_0": lambda b, i: _fp16(b, 0) * (_nibble(b, 6, i, 16) + _fifth(b, 2, i) - 16),
    "Q5_1": lambda b, i: _fp16(b, 0) * (_nibble(b, 8, i, 16) + _fifth(b, 4, i)) + _fp16(b, 2),
    "Q8_0": lambda b, i: _fp16(b, 0) * struct.unpack_from("<b", b, 2 + i)[0],
    "Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6,
}
FP16 = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
        "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block has them
