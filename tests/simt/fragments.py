"""Which lane holds what of a matrix in mma: the tables of the PTX ISA, written out.

There, lane = 4·g + t, and element i of a fragment, from the low end of its first register on, has a row and a column.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Place = Callable[[int, int, int], tuple[int, int]]  # (g, t, i) → (row, column)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@dataclass(frozen=True)
class Shape:
    m: int
    k: int
    bits: int
    a: Place
    b: Place
    c: Place


def c8(g: int, t: int, i: int) -> tuple[int, int]:
    return g, 2 * t + i


def c16(g: int, t: int, i: int) -> tuple[int, int]:
    return g if i < 2 else g + 8, 2 * t + (i & 1)


M8N8K16_8BIT = Shape(8, 16, 8, lambda g, t, i: (g, 4 * t + i), lambda g, t, i: (4 * t + i, g), c8)
M8N8K32_4BIT = Shape(8, 32, 4, lambda g, t, i: (g, 8 * t + i), lambda g, t, i: (8 * t + i, g), c8)
M16N8K8_16BIT = Shape(
    16, 8, 16,
    lambda g, t, i: (g if i < 2 else g + 8, 2 * t + (i & 1)),
    lambda g, t, i: (2 * t + i, g), c16)
M16N8K16_16BIT = Shape(
    16, 16, 16,
    lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, 2 * t + (i & 1) + (0 if i < 4 else 8)),
    lambda g, t, i: (2 * t + (i & 1) + (0 if i < 2 else 8), g), c16)
M16N8K32_8BIT = Shape(
    16, 32, 8,
    lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, 4 * t + (i & 3) + (0 if i < 8 else 16)),
    lambda g, t, i: (4 * t + (i & 3) + (0 if i < 4 else 16), g), c16)
M16N8K64_4BIT = Shape(
    16, 64, 4,
    lambda g, t, i: (g if i < 8 or 16 <= i < 24 else g + 8, 8 * t + (i & 7) + (0 if i < 16 else 32)),
    lambda g, t, i: (8 * t + (i & 7) + (0 if i < 8 else 32), g), c16)


def places(place: Place, count: int) -> Tensor:
    """(32, count, 2): row and column of each element of each lane's fragment."""
    return torch.tensor([[place(lane // 4, lane % 4, i) for i in range(count)] for lane in range(32)])


def of_warpgroup(place: Place, count: int) -> Tensor:
    """(128, count, 2): of wgmma, where every warp has 16 rows more."""
    return torch.cat([places(place, count) + torch.tensor([16 * warp, 0]) for warp in range(4)])


def wgmma_d(g: int, t: int, i: int) -> tuple[int, int]:
    return g if i % 4 < 2 else g + 8, 2 * t + (i & 1) + 8 * (i // 4)


def spread(matrix: Tensor, place: Place) -> Tensor:
    """The matrix as fragments: (32, elements of a lane)."""
    rows, columns = places(place, matrix.numel() // 32).unbind(-1)
    return matrix[rows, columns]


def registers(codes: Tensor, bits: int) -> Tensor:
    """Fragments of `bits` each, put together in registers of 32 bits, the first in the lowest bits."""
    codes = (codes.long() & (1 << bits) - 1).view(32, -1, 32 // bits)
    words = (codes << torch.arange(0, 32, bits)).sum(-1)
    return words.sub(words >> 31 << 32).to(torch.int32)


# ---- number formats: bit patterns → values ---------------------------------------------------------------------------


def signed(bits: int) -> Callable[[Tensor], Tensor]:
    return lambda codes: torch.where(codes >= 1 << bits - 1, codes - (1 << bits), codes).double()


def floats(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda codes: codes.to(torch.int32).to(torch.int16).view(dtype).double()


DECODE = {"s4": signed(4), "u4": torch.Tensor.double, "s8": signed(8), "bf16": floats(torch.bfloat16),
          "f16": floats(torch.float16), "e2m1": lambda codes: E2M1[codes]}
