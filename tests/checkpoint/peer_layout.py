"""Where Nunchaku's files hold what, by formulas written by hand: nothing here knows `Layout`.

Each function gives, for every element in rows, its place in the file; the tests scatter by it."""
from __future__ import annotations

import torch
from torch import Tensor


def _grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None]


def code_places(n: int, k: int) -> Tensor:
    """(n, k): the nibble of code (row, column); the low nibble of byte b is 2·b."""
    row, column = _grid(n, k)
    word = (row // 128) * (k // 64) + column // 64
    word = word * 8 + row % 128 // 16
    word = word * 8 + row % 8
    word = word * 4 + column % 32 // 8
    word = word * 2 + row % 16 // 8
    word = word * 2 + column % 64 // 32
    return word * 8 + column % 8


def scale_places(n: int, groups: int) -> Tensor:
    """(n, groups) of 16-bit scales, and of vectors, which have one group."""
    row, group = _grid(n, groups)
    place = (row // 128) * groups + group
    place = place * 8 + row % 128 // 16
    place = place * 4 + row % 8 // 2
    place = place * 2 + row % 16 // 8
    return place * 2 + row % 2


def micro_scale_places(n: int, groups: int) -> Tensor:
    """(n, groups) of e4m3 scales."""
    row, group = _grid(n, groups)
    place = (row // 128) * (groups // 4) + group // 4
    place = place * 8 + row % 8
    place = place * 4 + row % 32 // 8
    place = place * 4 + row % 128 // 32
    return place * 4 + group % 4


def _low_rank_places(channel: Tensor, rank: Tensor, ranks: int, a: Tensor, b: Tensor) -> Tensor:
    place = (channel // 16) * (ranks // 16) + rank // 16
    place = place * 8 + a % 8
    place = place * 4 + b % 8 // 2
    place = place * 2 + a // 8
    place = place * 2 + b // 8
    return place * 2 + b % 2


def down_places(ranks: int, k: int) -> Tensor:
    rank, channel = _grid(ranks, k)
    return _low_rank_places(channel, rank, ranks, rank % 16, channel % 16)


def up_places(n: int, ranks: int) -> Tensor:
    channel, rank = _grid(n, ranks)
    return _low_rank_places(channel, rank, ranks, channel % 16, rank % 16)


def awq_places(n: int, k: int) -> Tensor:
    """(n, k): the nibble of a W4A16 code, in rows of k int16 for four rows of the weight."""
    row, column = _grid(n, k)
    word = (row // 4) * k + (column // 64) * 64 + (row % 4) * 16 + (column % 64 // 32) * 8 + column % 8
    return word * 4 + column % 32 // 8


def scattered(values: Tensor, places: Tensor) -> Tensor:
    """Flat, each value at its place; every place taken once."""
    assert places.flatten().sort().values.equal(torch.arange(places.numel()))
    out = torch.empty(values.numel(), dtype=values.dtype)
    out[places.flatten()] = values.flatten()
    return out


def nibbles(codes: Tensor) -> Tensor:
    """uint8 of flat codes, the first of two in the low nibble."""
    even, odd = codes.to(torch.uint8).reshape(-1, 2).unbind(1)
    return even | (odd << 4)
