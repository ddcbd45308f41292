"""Blocks of GGML's quantized types as numbers. Of each block the bytes are given as one row, (blocks, bytes) uint8.

    Q4_0, Q5_0, Q8_0     d·(q − z), one fp16 d for 32 codes, z half of the codes' range (Q8_0: signed, z = 0)
    Q4_1, Q5_1           d·q + m
    Q2_K, Q4_K, Q5_K     (d·s)·q − (dmin·t), fp16 d and dmin for 256 codes, whole s and t for 16 (Q2_K) or 32 of them
    Q3_K, Q6_K           (d·s)·(q − z), signed s for 16 codes

The products have at most 24 bits, so fp32 holds them exactly, and rounds sums and differences once."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """A quantized type: its name, values and bytes of a block, and what reads blocks."""

    name: str
    values: int
    nbytes: int
    read: Callable[[Tensor], Tensor]


def codes(data: Tensor, bits: int, run: int) -> Tensor:
    """(blocks, bytes·8/bits) uint8: codes packed so that each `run` bytes hold `run` codes in their lowest bits, the
    next `run` codes in the bits above those, and so on."""
    packed = data.reshape(data.shape[0], -1, run)
    return torch.stack([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], 2).flatten(1)


def _half(data: Tensor) -> Tensor:
    """(blocks, 1) fp32, of two bytes that are a fp16 number."""
    return data.contiguous().view(torch.float16).float()


def _signed(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int8).float()


def _scaled(scale: Tensor, q: Tensor, offset: Tensor | None = None) -> Tensor:
    """(blocks, values): of (blocks, n) scales and offsets, scale·q − offset for values/n codes q in a row."""
    product = scale[..., None] * q.float().reshape(*scale.shape, -1)
    return (product if offset is None else product - offset[..., None]).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (codes(b[:, 2:], 4, 16).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * codes(b[:, 4:], 4, 16) + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * ((codes(b[:, 6:], 4, 16) + 16 * codes(b[:, 2:6], 1, 1)).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (codes(b[:, 8:], 4, 16) + 16 * codes(b[:, 4:8], 1, 1)) + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _signed(b[:, 2:])


def _q2_k(b: Tensor) -> Tensor:
    scales, q = b[:, :16], codes(b[:, 16:80], 2, 32)
    step, offset = _half(b[:, 80:82]) * (scales & 15), _half(b[:, 82:84]) * (scales >> 4)
    return _scaled(step, q, offset)


def _q3_k(b: Tensor) -> Tensor:
    q = (codes(b[:, 32:96], 2, 32) + 4 * codes(b[:, :32], 1, 32)).float() - 4
    scales = (codes(b[:, 96:104], 4, 8) + 16 * codes(b[:, 104:108], 2, 4)).float() - 32
    return _scaled(_half(b[:, 108:110]) * scales, q)


def _scales_of_8(b: Tensor) -> tuple[Tensor, Tensor]:
    """(s, t), each (blocks, 8) of 6 bits, out of 12 bytes: the first four of each lie in the low bits of bytes 0 to 3
    and 4 to 7, the others have their low bits in bytes 8 to 11 and their high ones above the first four."""
    s, t, low = b[:, :4], b[:, 4:8], b[:, 8:]
    return torch.cat([s & 63, (low & 15) | (s >> 6 << 4)], 1), torch.cat([t & 63, (low >> 4) | (t >> 6 << 4)], 1)


def _of_8(b: Tensor, q: Tensor) -> Tensor:
    s, t = _scales_of_8(b[:, 4:16])
    return _scaled(_half(b[:, :2]) * s, q, _half(b[:, 2:4]) * t)


def _q4_k(b: Tensor) -> Tensor:
    return _of_8(b, codes(b[:, 16:], 4, 32))


def _q5_k(b: Tensor) -> Tensor:
    return _of_8(b, codes(b[:, 48:], 4, 32) + 16 * codes(b[:, 16:48], 1, 32))


def _q6_k(b: Tensor) -> Tensor:
    q = (codes(b[:, :128], 4, 64) + 16 * codes(b[:, 128:192], 2, 32)).float() - 32
    return _scaled(_half(b[:, 208:210]) * _signed(b[:, 192:208]), q)


KINDS: dict[int, Kind] = {  # by their numbers in files
    2: Kind("Q4_0", 32, 18, _q4_0), 3: Kind("Q4_1", 32, 20, _q4_1), 6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1), 8: Kind("Q8_0", 32, 34, _q8_0), 10: Kind("Q2_K", 256, 84, _q2_k),
    11: Kind("Q3_K", 256, 110, _q3_k), 12: Kind("Q4_K", 256, 144, _q4_k), 13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
}
