"""Single tensors of Nunchaku's files, from the order of its kernels to rows and back. What pads is cut, and made anew.

n, k, groups, rank: of the tensor in rows. Each pair are inverses of each other."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...formats import row_chunks
from ...layout import Layout
from .layouts import AWQ_COLUMNS, AWQ_PAIRS, CHANNELS, DOWN, MICRO_SCALES, RANKS, SCALES, UP, WEIGHT_WORDS, whole

EIGHTS, FOURS = (8, 0x0000FF00), (4, 0x00F000F0)
IN_CACHE = 2**17  # words shuffled at a time


def unpack_codes(packed: Tensor, n: int, k: int) -> Tensor:
    """`codes` uint8 (n, ceil(k/2)) of int8 (N, K/2)."""
    codes = WEIGHT_WORDS.unpack(packed.contiguous().view(torch.int32)).view(torch.uint8)
    codes = codes[:n, :-(-k // 2)].contiguous()
    if k % 2:
        codes[:, -1] &= 0xF
    return codes


def pack_codes(codes: Tensor, k: int) -> Tensor:
    n = codes.shape[0]
    codes = _padded(codes, (whole(n, CHANNELS), whole(k, CHANNELS) // 2), 0)
    return WEIGHT_WORDS.pack(codes.view(torch.int32)).view(torch.int8)


def unpack_scales(packed: Tensor, n: int, groups: int) -> Tensor:
    """`scales` (n, groups) of (G, N): 16 bit of INT4, float8_e4m3fn of NVFP4."""
    order, bits = _scale_order(packed.dtype)
    logical = order.unpack(packed.contiguous().view(bits), (packed.shape[1], packed.shape[0]))
    return logical[:n, :groups].contiguous().view(packed.dtype)


def pack_scales(scales: Tensor, padded_groups: int) -> Tensor:
    order, bits = _scale_order(scales.dtype)
    n = whole(scales.shape[0], CHANNELS)
    one = torch.ones((), dtype=scales.dtype).view(bits).item()
    return order.pack(_padded(scales.view(bits), (n, padded_groups), one)).view(scales.dtype).reshape(padded_groups, n)


def _scale_order(dtype: torch.dtype) -> tuple[Layout, torch.dtype]:
    """The order, and an integer type of the same size: not every operation knows 8-bit floats."""
    return (MICRO_SCALES, torch.uint8) if dtype == torch.float8_e4m3fn else (SCALES, torch.int16)


def unpack_vector(packed: Tensor, n: int) -> Tensor:
    """A value for every channel, (n): bias, smooth, wcscales."""
    return SCALES.unpack(packed.reshape(-1, 1))[:n, 0].contiguous()


def pack_vector(vector: Tensor, fill: float) -> Tensor:
    return SCALES.pack(_padded(vector[:, None], (whole(vector.shape[0], CHANNELS), 1), fill)).reshape(-1)


def unpack_down(packed: Tensor, k: int, rank: int) -> Tensor:
    """`down` (rank, k) of (K, R)."""
    return DOWN.unpack(packed, (packed.shape[1], packed.shape[0]))[:rank, :k].contiguous()


def pack_down(down: Tensor, padded_rank: int) -> Tensor:
    k = whole(down.shape[1], CHANNELS)
    return DOWN.pack(_padded(down, (padded_rank, k), 0)).reshape(k, padded_rank)


def unpack_up(packed: Tensor, n: int, rank: int) -> Tensor:
    """`up` (n, rank) of (N, R)."""
    return UP.unpack(packed)[:n, :rank].contiguous()


def pack_up(up: Tensor, padded_rank: int) -> Tensor:
    return UP.pack(_padded(up, (whole(up.shape[0], CHANNELS), padded_rank), 0))


def unpack_awq_codes(packed: Tensor, n: int, k: int) -> Tensor:
    """`codes` uint8 (n, k/2) of W4A16, int16 (n/4, k) or int32 (n/4, k/2)."""
    words = packed.contiguous().view(torch.int32).flatten()
    pairs = torch.empty_like(words)
    for part in row_chunks(words.numel(), 1, IN_CACHE):
        pairs[part] = _swapped(_swapped(words[part], *EIGHTS), *FOURS)
    return AWQ_PAIRS.unpack(pairs.view(torch.uint8), (n, k // 2))


def pack_awq_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    words = AWQ_PAIRS.pack(codes).view(torch.int32).flatten()
    for part in row_chunks(words.numel(), 1, IN_CACHE):
        words[part] = _swapped(_swapped(words[part], *FOURS), *EIGHTS)
    return words.view(codes.shape[0] // 4, -1).view(dtype)


def _swapped(words: Tensor, shift: int, mask: int) -> Tensor:
    """Bits under the mask change places with those `shift` above them. EIGHTS, then FOURS: nibbles 01234567 become
    04152637."""
    change = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
    return (change << shift).bitwise_xor_(change).bitwise_xor_(words)


def unpack_awq_scales(packed: Tensor, n: int, groups: int) -> Tensor:
    """`scales` or `zeros` (n, groups) of (G, n)."""
    return packed[:groups, :n].T.contiguous()


def pack_awq_scales(scales: Tensor, padded_groups: int) -> Tensor:
    return _padded(scales.T, (padded_groups, scales.shape[0]), 0).contiguous()


def padded_groups(k: int, group: int) -> int:
    """How many rows of wscales a W4A4 linear has: of K padded."""
    return whole(k, CHANNELS) // group


def padded_rank(rank: int) -> int:
    return max(whole(rank, RANKS), RANKS)


def awq_groups(k: int, group: int) -> int:
    """How many rows of scales a W4A16 linear has: those that its kernels read in whole words."""
    return whole(-(-k // group), 16 if group == 64 else 8)


def awq_fits(n: int, k: int, group: int) -> bool:
    return n % 8 == 0 and k % AWQ_COLUMNS == 0 and k % group == 0


def _padded(x: Tensor, shape: tuple[int, int], fill: float) -> Tensor:
    rows, columns = (wanted - size for wanted, size in zip(shape, x.shape, strict=True))
    return F.pad(x, (0, columns, 0, rows), value=fill).contiguous()
