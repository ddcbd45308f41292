"""Single tensors: packing and unpacking are inverses, and agree with formulas written by hand."""
from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nunchaku_py.checkpoint.nunchaku import packing
from tests.checkpoint import peer_layout as peer
from tests.checks import same_bits

SHAPES = [(128, 128), (256, 384), (384, 128), (200, 136), (100, 77), (1, 1), (129, 300)]
AWQ_SHAPES = [(4, 64), (48, 192), (768, 128), (12, 320)]
E4M3 = torch.float8_e4m3fn


def codes_of(n: int, k: int) -> Tensor:
    return torch.randint(0, 16, (n, k), dtype=torch.uint8)


def rows_of(codes: Tensor) -> Tensor:
    """uint8 (n, ceil(k/2)): even columns in the low nibble."""
    codes = pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def up_to(size: int, tile: int) -> int:
    return (size + tile - 1) // tile * tile


def grown(x: Tensor, rows: int, columns: int, fill: float) -> Tensor:
    out = torch.full((rows, columns), fill).to(x.dtype)
    out[:x.shape[0], :x.shape[1]] = x
    return out


@pytest.mark.parametrize("n, k", SHAPES)
def test_codes(n: int, k: int):
    codes = codes_of(n, k)
    packed = packing.pack_codes(rows_of(codes), k)
    rows, columns = up_to(n, 128), up_to(k, 128)
    assert packed.shape == (rows, columns // 2) and packed.dtype == torch.int8
    by_hand = peer.nibbles(peer.scattered(grown(codes, rows, columns, 0), peer.code_places(rows, columns)))
    assert torch.equal(packed.view(torch.uint8).flatten(), by_hand)
    assert torch.equal(packing.unpack_codes(packed, n, k), rows_of(codes))


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("dtype, group", [(torch.bfloat16, 64), (torch.float16, 64), (E4M3, 16)])
def test_scales(n: int, k: int, dtype: torch.dtype, group: int):
    groups, rows = -(-k // group), up_to(n, 128)
    padded = packing.padded_groups(k, group)
    scales = (torch.rand(n, groups) + 0.1).to(dtype)
    packed = packing.pack_scales(scales, padded)
    assert padded == up_to(k, 128) // group and packed.shape == (padded, rows) and packed.dtype == dtype
    places = (peer.micro_scale_places if dtype == E4M3 else peer.scale_places)(rows, padded)
    by_hand = peer.scattered(grown(scales.float(), rows, padded, 1), places)
    assert torch.equal(packed.float().flatten(), by_hand)
    assert same_bits(packing.unpack_scales(packed, n, groups), scales)


@pytest.mark.parametrize("n", [1, 100, 128, 300])
def test_vectors(n: int):
    vector = torch.randn(n).bfloat16()
    packed = packing.pack_vector(vector, 1)
    by_hand = peer.scattered(grown(vector[:, None], up_to(n, 128), 1, 1), peer.scale_places(up_to(n, 128), 1))
    assert same_bits(packed, by_hand) and same_bits(packing.unpack_vector(packed, n), vector)


@pytest.mark.parametrize("channels", [128, 200, 77])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_branches(channels: int, rank: int):
    wide, ranks = up_to(channels, 128), packing.padded_rank(rank)
    down, up = torch.randn(rank, channels).bfloat16(), torch.randn(channels, rank).half()
    packed_down, packed_up = packing.pack_down(down, ranks), packing.pack_up(up, ranks)
    assert packed_down.shape == packed_up.shape == (wide, ranks)
    assert same_bits(packed_down.flatten(), peer.scattered(grown(down, ranks, wide, 0), peer.down_places(ranks, wide)))
    assert same_bits(packed_up.flatten(), peer.scattered(grown(up, wide, ranks, 0), peer.up_places(wide, ranks)))
    assert same_bits(packing.unpack_down(packed_down, channels, rank), down)
    assert same_bits(packing.unpack_up(packed_up, channels, rank), up)


@pytest.mark.parametrize("n, k", AWQ_SHAPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_codes_of_w4a16(n: int, k: int, dtype: torch.dtype):
    codes = codes_of(n, k)
    packed = packing.pack_awq_codes(rows_of(codes), dtype)
    assert packed.shape == (n // 4, k // 2 if dtype == torch.int32 else k) and packed.dtype == dtype
    by_hand = peer.nibbles(peer.scattered(codes, peer.awq_places(n, k)))
    assert torch.equal(packed.view(torch.uint8).flatten(), by_hand)
    assert torch.equal(packing.unpack_awq_codes(packed, n, k), rows_of(codes))


def test_scales_of_w4a16():
    scales = torch.rand(24, 3).bfloat16()
    packed = packing.pack_awq_scales(scales, packing.awq_groups(192, 64))
    assert packed.shape == (16, 24) and not packed[3:].any() and same_bits(packed[:3], scales.T.contiguous())
    assert same_bits(packing.unpack_awq_scales(packed, 24, 3), scales)
    assert (packing.awq_groups(3072, 64), packing.awq_groups(4096, 128), packing.awq_groups(10240, 128)) == (48, 32, 80)


@pytest.mark.parametrize("shape", [(128, 64), (256, 192)])
def test_unpacked_bytes_pack_to_the_same(shape: tuple[int, int]):
    """The other way round: whatever a file holds comes out as it was."""
    n, half = shape
    raw = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(packing.pack_codes(packing.unpack_codes(raw, n, 2 * half), 2 * half), raw)
    words = torch.randint(-2**31, 2**31, (n // 4, half), dtype=torch.int32)
    assert torch.equal(packing.pack_awq_codes(packing.unpack_awq_codes(words, n, 2 * half), torch.int32), words)
    vector = torch.randn(n)
    assert torch.equal(packing.pack_vector(packing.unpack_vector(vector, n), 1), vector)


STARTS = {
    "codes": "3096fc523096fc52", "w4a16": "8080b3b3e6e61919", "down": "0000003e803f903f",
    "up": "0000003e803f903f", "scales": "0000803f00411041", "vector": "0000803f00411041"}
SUMS = {
    "codes": "a3c2ab3ecfabc4ef", "w4a16": "5c85e22f67c6e3b4", "down": "fd929eb21a6c886e",
    "up": "59dc6a022e3b7ceb", "scales": "1a920eb2bbcb953c", "vector": "220bd7d64a2b2b37"}


def test_golden_bytes():
    """Of a pattern in closed form; a change of the code and of the formulas would be seen here."""
    row, column = torch.arange(128)[:, None], torch.arange(128)[None]
    codes = rows_of(((7 * row + 3 * column) % 16).to(torch.uint8))
    packed = {"codes": packing.pack_codes(codes, 128), "w4a16": packing.pack_awq_codes(codes, torch.int32),
              "down": packing.pack_down((row[:16] + column / 8).bfloat16(), 16),
              "up": packing.pack_up((row + column[:, :16] / 8).bfloat16(), 16),
              "scales": packing.pack_scales((row + column[:, :2] / 8).bfloat16(), 2),
              "vector": packing.pack_vector(row[:, 0].bfloat16(), 1)}
    starts = {name: bytes(tensor.view(torch.uint8).flatten()[:8].tolist()).hex() for name, tensor in packed.items()}
    sums = {name: hashlib.sha256(bytes(tensor.view(torch.uint8).flatten().tolist())).hexdigest()[:16]
            for name, tensor in packed.items()}
    assert starts == STARTS and sums == SUMS
