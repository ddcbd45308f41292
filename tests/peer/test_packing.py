"""Every tensor of Nunchaku's files, packed and unpacked: inverses, and byte for byte what the format's formulas say."""
from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from nunchaku_py.checkpoint.nunchaku import packing
from tests.checks import same_bits
from tests.peer import layout as peer

SHAPES = [(1, 1), (3, 5), (128, 128), (127, 129), (130, 64), (200, 96), (256, 320), (129, 63), (16, 500), (300, 33)]
WHOLE = [(128, 128), (256, 128), (128, 384), (384, 256)]
AWQ = [(8, 64), (16, 128), (24, 192), (768, 128), (40, 640)]
RANKS = [1, 15, 16, 17, 32, 48]
HALVES = [torch.bfloat16, torch.float16]


def random_bits(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Any bits at all, NaN and infinities too: packing moves numbers and never reads them."""
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


def nibbles(codes: Tensor) -> Tensor:
    """uint8 (N, ceil(K/2)), even k in the low nibble."""
    codes = peer.padded(codes, codes.shape[0], peer.whole(codes.shape[1], 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def random_codes(n: int, k: int) -> Tensor:
    return torch.randint(0, 16, (n, k), dtype=torch.uint8)


def grown(n: int, k: int) -> tuple[int, int]:
    return peer.whole(n, 128), peer.whole(k, 128)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_codes(n: int, k: int) -> None:
    codes = random_codes(n, k)
    packed = packing.pack_codes(nibbles(codes), k)
    assert same_bits(packed, peer.weight(peer.padded(codes, *grown(n, k))))
    assert same_bits(packing.unpack_codes(packed, n, k), nibbles(codes))


@pytest.mark.parametrize(("n", "k"), WHOLE)
def test_codes_of_a_file(n: int, k: int) -> None:
    packed = random_bits(n, k // 2, dtype=torch.int8)
    assert same_bits(packing.pack_codes(packing.unpack_codes(packed, n, k), k), packed)


def test_the_unused_nibble_of_an_odd_row_is_zero() -> None:
    packed = random_bits(128, 64, dtype=torch.int8)
    assert not (packing.unpack_codes(packed, 128, 77)[:, -1] >> 4).any()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_scales(n: int, k: int, dtype: torch.dtype) -> None:
    group, order = (16, peer.micro_scales) if dtype == torch.float8_e4m3fn else (64, peer.scales)
    scales, groups = random_bits(n, peer.whole(k, group) // group, dtype=dtype), grown(n, k)[1] // group
    assert packing.padded_groups(k, group) == groups
    packed = packing.pack_scales(scales, groups)
    assert same_bits(packed, order(peer.padded(scales, grown(n, k)[0], groups, fill=1)))
    assert same_bits(packing.unpack_scales(packed, n, scales.shape[1]), scales)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("n", "k"), WHOLE)
def test_scales_of_a_file(n: int, k: int, dtype: torch.dtype) -> None:
    groups = k // (16 if dtype == torch.float8_e4m3fn else 64)
    packed = random_bits(groups, n, dtype=dtype)
    assert same_bits(packing.pack_scales(packing.unpack_scales(packed, n, groups), groups), packed)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 63, 127, 128, 129, 255, 384, 1000])
def test_vectors(n: int, dtype: torch.dtype) -> None:
    values, fill = random_bits(n, dtype=dtype), 1.0
    packed = packing.pack_vector(values, fill)
    assert same_bits(packed, peer.vector(peer.padded(values, peer.whole(n, 128), fill=fill)))
    assert same_bits(packing.unpack_vector(packed, n), values)
    file = random_bits(peer.whole(n, 128), dtype=dtype)
    assert same_bits(packing.pack_vector(packing.unpack_vector(file, file.shape[0]), fill), file)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("size", [1, 100, 128, 129, 300])
def test_branches(size: int, rank: int) -> None:
    ranks, places = packing.padded_rank(rank), peer.whole(size, 128)
    assert ranks == peer.whole(rank, 16)
    for pack, unpack, order, shape, whole in (
            (packing.pack_down, packing.unpack_down, peer.down, (rank, size), (ranks, places)),
            (packing.pack_up, packing.unpack_up, peer.up, (size, rank), (places, ranks))):
        factor, file = random_bits(*shape), random_bits(places, ranks)
        packed = pack(factor, ranks)
        assert same_bits(packed, order(peer.padded(factor, *whole)))
        assert same_bits(unpack(packed, size, rank), factor)
        assert same_bits(pack(unpack(file, places, ranks), ranks), file)


@pytest.mark.parametrize(("n", "k"), AWQ)
def test_codes_of_w4a16(n: int, k: int) -> None:
    codes, file = random_codes(n, k), random_bits(n // 4, k, dtype=torch.int16)
    for dtype in (torch.int16, torch.int32):
        packed = packing.pack_awq_codes(nibbles(codes), dtype)
        assert same_bits(packed, peer.awq(codes).view(dtype))
        assert same_bits(packing.unpack_awq_codes(packed, n, k), nibbles(codes))
        assert same_bits(packing.pack_awq_codes(packing.unpack_awq_codes(file.view(dtype), n, k), dtype),
                         file.view(dtype))


@pytest.mark.parametrize(("group", "rows"), [(64, 16), (128, 8)])
@pytest.mark.parametrize("k", [128, 256, 1024, 1152, 3072])
def test_scales_of_w4a16(k: int, group: int, rows: int) -> None:
    scales, file = random_bits(24, k // group), random_bits(peer.whole(k // group, rows), 24)
    packed = packing.pack_awq_scales(scales, packing.awq_groups(k, group))
    assert same_bits(packed, peer.awq_scales(scales, rows))
    assert same_bits(packing.unpack_awq_scales(packed, 24, k // group), scales)
    assert same_bits(packing.pack_awq_scales(packing.unpack_awq_scales(file, 24, file.shape[0]), file.shape[0]), file)


# ---------------------------------------------------------------------------------------- bytes, written down by hand
def pattern(rows: int, columns: int) -> Tensor:
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return ((7 * n + 3 * k) % 16).to(torch.uint8)


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Bits that tell every place from its neighbours."""
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    if dtype.itemsize == 1:
        return ((37 * n + 101 * k) % 256).to(torch.uint8).view(dtype)
    return ((257 * n + 4099 * k) % 32768).to(torch.int16).view(dtype)


GOLDEN = {  # name: (the first 16 bytes, the beginning of the SHA-256 of all)
    "codes": ("3096fc523096fc52b81e74dab81e74da", "843594cca110b600"),
    "scales": ("0000010108080909020203030a0a0b0b", "17ae8e33c08fd1e4"),
    "micro scales": ("0065ca2fa0056acf40a50a6fe045aa0f", "ac6313c65c5227cd"),
    "vector": ("0000010108080909020203030a0a0b0b", "a004e5af13eb9f1e"),
    "down": ("0000031018001b1008080b1820082318", "cd3fbf9d5db02217"),
    "up": ("0000031018001b1008080b1820082318", "b130759ae315c8bb"),
    "awq codes": ("8080b3b3e6e619194c4c7f7fa2a2d5d5", "c682283dda015342"),
    "awq scales": ("00000101020203030404050506060707", "ced594962717a8a5"),
}


def made() -> dict[str, Tensor]:
    codes, half, micro = nibbles(pattern(256, 192)), torch.bfloat16, torch.float8_e4m3fn
    return {
        "codes": packing.pack_codes(codes, 192),
        "scales": packing.pack_scales(numbers(256, 3, half), 4),
        "micro scales": packing.pack_scales(numbers(256, 12, micro), 16),
        "vector": packing.pack_vector(numbers(200, 1, half)[:, 0], 1.0),
        "down": packing.pack_down(numbers(20, 200, half), 32),
        "up": packing.pack_up(numbers(200, 20, half), 32),
        "awq codes": packing.pack_awq_codes(codes, torch.int32),
        "awq scales": packing.pack_awq_scales(numbers(24, 3, half), 16),
    }


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_bytes(name: str) -> None:
    """So that a change of the format's two writings at once is seen. The first word of codes by hand: n = 0, k = 0 … 7
    are 0 3 6 9 12 15 2 5; the third word, n = 8: 8 11 14 1 4 7 10 13."""
    tensor = made()[name]
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert (data[:16].hex(), hashlib.sha256(data).hexdigest()[:16]) == GOLDEN[name]
