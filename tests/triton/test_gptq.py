"""GPTQ's column loop by the Triton kernel against the torch code of the step."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.kernels import gptq as kernel
from nunchaku_py.methods import fast
from nunchaku_py.methods.fit import fit
from nunchaku_py.methods.gptq import Grid, ordered_factor, sweep
from tests.methods.layers import CTX, small

FORMATS = pytest.mark.parametrize("fmt", ["int4", "nvfp4"])


def test_the_step_knows_how_many_columns_it_takes():
    assert fast.TRITON_COLUMNS == kernel.COLUMNS


def run(device: str, backend: str, columns: Tensor, upper: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    columns, upper = columns.to(device, copy=True), upper.to(device)
    errors = torch.empty_like(columns)
    here = Grid(grid.format, *(t.to(device) for t in (grid.step, grid.inverse, grid.group)))
    with ops.backend(backend):
        assert (fast.sweep_columns(columns) > 0) == (backend == "triton")
        sweep(columns, errors, here, upper, 0)
    return columns.cpu(), errors.cpu()


@FORMATS
@pytest.mark.parametrize("n, k", [(21, 70), (16, 128), (1, 5)])
def test_columns_that_nothing_couples_have_the_bits_of_the_reference(device: str, fmt: str, n: int, k: int) -> None:
    work, _ = small(fmt, rank=0, n=max(n, 3), k=k)
    work.weight = work.weight[:n]
    fit(work, CTX)
    grid = Grid.of(work.residual, torch.arange(k))
    upper = torch.diag(torch.rand(k, generator=torch.Generator().manual_seed(0)) + 0.5)
    found = run(device, "triton", work.weight.T.contiguous(), upper, grid)
    expected = run("cpu", "torch", work.weight.T.contiguous(), upper, grid)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@FORMATS
def test_a_whole_sweep_is_that_of_the_reference_but_for_ties(device: str, fmt: str) -> None:
    work, _ = small(fmt, rank=0, n=18, k=140)
    fit(work, CTX)
    order, upper = ordered_factor(work, CTX)
    columns, grid = work.weight.T[order].contiguous(), Grid.of(work.residual, order)
    found, _ = run(device, "triton", columns, upper, grid)
    again, _ = run(device, "triton", columns, upper, grid)
    expected, _ = run("cpu", "torch", columns, upper, grid)
    assert torch.equal(found, again)
    assert (found == expected).all(0).float().mean() > 0.9  # rows; one that meets a tie goes its own way after it
