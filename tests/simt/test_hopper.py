"""TMA, mbarriers, clusters and wgmma on the host, against their descriptions in the PTX ISA."""
from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.simt import fragments
from tests.simt.build import Fault

BOX = 128  # bytes of a row
COLUMNS = (64, 96, 128, 160, 192, 224, 256)


def random_bytes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


def part(matrix: Tensor, byte: int, row: int, rows: int) -> Tensor:
    """A box of the matrix, zero outside."""
    wide = torch.nn.functional.pad(matrix, (300,) * 4)
    return wide[300 + row:300 + row + rows, 300 + byte:300 + byte + BOX]


def swizzled(box: Tensor) -> Tensor:
    """As TMA leaves it: of row r, chunk c of 16 bytes at place c ^ r % 8."""
    rows = torch.arange(len(box))[:, None]
    return box.view(-1, 8, 16)[rows, torch.arange(8) ^ rows % 8]


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize(("rows", "row_bytes", "byte", "row", "box_rows"), (
    (64, 128, 0, 0, 64),
    (5, 48, 0, 0, 8),
    (100, 272, 128, 64, 64),  # beyond both ends
    (100, 272, 256, 99, 2),
    (100, 400, -40, -3, 32),
    (100, 400, 37, 50, 256),
    (100, 400, 400, 0, 16),  # nothing of it is inside
))
def test_boxes(library, rows: int, row_bytes: int, byte: int, row: int, box_rows: int, cluster: int, order: dict,
               timing: dict) -> None:
    matrix, out = random_bytes(rows, row_bytes), torch.full((cluster, box_rows, 8, 16), 77, dtype=torch.uint8)
    library.run("box", matrix, out, rows, row_bytes, byte, row, box_rows, cluster, **order, **timing)
    want = swizzled(part(matrix, byte, row, box_rows))
    assert all(torch.equal(block, want) for block in out)  # to each block of the cluster came all of it


@pytest.mark.parametrize(("rows", "row_bytes", "box_rows", "words"), (
    (0, 128, 64, "at least one row, not 0"),
    (1, 100, 64, "rows of a multiple of 16 bytes, fewer than 2^32, not of 100"),
    (1, 0, 64, "rows of a multiple of 16 bytes"),
    (1, 128, 512, "boxes of 1 to 256 rows, not of 512"),
))
def test_impossible_maps(library, rows: int, row_bytes: int, box_rows: int, words: str) -> None:
    with pytest.raises(Fault, match=f"^a tensor map needs {re.escape(words)}"):
        library.run("box", random_bytes(1, 128), torch.zeros(16, dtype=torch.uint8), rows, row_bytes, 0, 0, box_rows, 1)


def test_impossible_clusters(library) -> None:
    for cluster, words in ((0, "clusters of 0"), (16, "clusters of 16")):
        with pytest.raises(Fault, match=f"^launch: {words}"):
            library.run("empty_clusters", 32, cluster)
    with pytest.raises(Fault, match="^launch: clusters of 2 in a grid of 3 blocks along x"):
        library.run("empty_clusters", 3, 2)
    library.run("empty_clusters", 32, 8)


# ---- wgmma -----------------------------------------------------------------------------------------------------------


def spread(matrix: Tensor, place: fragments.Place, count: int) -> Tensor:
    """(128, count): the matrix as the fragments of a warpgroup."""
    rows, columns = fragments.of_warpgroup(place, count).unbind(-1)
    return matrix[rows, columns]


def a_fragments(a: Tensor) -> Tensor:
    """(steps of 32 columns, 128, 4) registers: A, zero beyond its end, for the form that has it there."""
    padded = torch.nn.functional.pad(a, (0, -a.shape[1] % BOX, 0, 64 - len(a))).to(torch.uint8)
    steps = [spread(step, fragments.M16N8K32_8BIT.a, 16) for step in padded.split(32, 1)]
    return torch.stack(steps).contiguous().view(torch.int32)


def run_wgmma(library, a: Tensor, b: Tensor, d: Tensor, add: bool, registers: bool, **mode: bool) -> Tensor:
    out = spread(d, fragments.wgmma_d, len(b) // 2).contiguous()
    codes = a_fragments(a) if registers else torch.zeros(0, dtype=torch.int32)
    library.run("wgmma", a, b, codes, out, len(a), len(b), a.shape[1], int(add), **mode)
    return out


@pytest.mark.parametrize("registers", (False, True), ids=("shared", "registers"))
@pytest.mark.parametrize("n", COLUMNS)
def test_wgmma(library, n: int, registers: bool, order: dict, timing: dict) -> None:
    """A of fewer rows, K in parts of a block."""
    for rows, k, add in ((64, 128, False), (37, 400, True)):
        a, b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((rows, k), (n, k)))
        d = torch.randint(-1000, 1000, (64, n), dtype=torch.int32)
        product = torch.nn.functional.pad(a.int() @ b.int().T, (0, 0, 0, 64 - rows))
        want = product + d * add
        got = run_wgmma(library, a, b, d, add, registers, **order, **timing)
        assert torch.equal(got, spread(want, fragments.wgmma_d, n // 2))


def test_sums_wrap(library) -> None:
    a, b = (torch.full((rows, 128), -128, dtype=torch.int8) for rows in (64, 64))
    got = run_wgmma(library, a, b, torch.full((64, 64), 2**31 - 1, dtype=torch.int32), True, False)
    assert torch.equal(got, torch.full_like(got, 128 * 128**2 - 2**31 - 1))
