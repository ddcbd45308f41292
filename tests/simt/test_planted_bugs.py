"""A right GEMM passes and each of its planted mistakes is caught: what a kernel test on the host is worth."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.simt.build import Call, Fault, Library

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
BUGS = {  # planted in planted_bugs.cpp → the fault that gives it away; None: a wrong result
    "no_barrier": "race|poison",
    "waits_for_one_group_too_few": "poison",
    "swapped_registers": None,
    "no_bound_on_stores": "out of bounds",
    "wrong_scale_index": None,
    "refills_a_stage_in_use": "race|poison",
    "low_rank_from_the_wrong_row": None,
}


@dataclass
class Problem:
    m: int
    n: int
    k: int
    r: int
    scales: str = "f16"

    def __post_init__(self) -> None:
        pitch = (self.m + 7) // 8 * 8
        self.qx, self.qw = (torch.randint(0, 256, (rows, self.k // 2), dtype=torch.uint8) for rows in (self.m, self.n))
        self.sx, self.sw = (0.01 + 0.09 * torch.rand(self.k // 64, rows) for rows in (pitch, self.n))
        self.sx[:, self.m:] = torch.nan  # padding that no result may depend on
        self.sx, self.sw = self.sx.to(DTYPES[self.scales]), self.sw.to(DTYPES[self.scales])
        self.h, self.up = (torch.rand(rows, self.r).mul(2).sub(1).bfloat16() for rows in (self.m, self.n))
        self.bias = torch.rand(self.n).bfloat16()

    def run(self, library: Library, bug: str = "none", **mode: bool | int) -> tuple[Tensor, Call]:
        y = torch.full((self.m, self.n), torch.nan, dtype=torch.bfloat16)
        tensors = (self.qx, self.qw, self.sx, self.sw, self.h, self.up, self.bias, y)
        sizes = (self.m, self.n, self.k, self.r, self.sx.shape[1])
        return y, library.run(f"gemm_{self.scales}", bug, *tensors, *sizes, **mode)

    def expected(self) -> tuple[Tensor, Tensor]:
        """y in double, and how far the kernel's may be off: half a step of bf16, and what float sums lose."""
        x, w = dequantize(self.qx, self.sx[:, :self.m]), dequantize(self.qw, self.sw)
        h, up, bias = self.h.double(), self.up.double(), self.bias.double()
        y = x @ w.T + h @ up.T + bias
        size = x.abs() @ w.abs().T + h.abs() @ up.abs().T + bias.abs()
        half_step = torch.exp2(y.abs().clamp(min=1e-30).log2().floor() - 8)
        return y, half_step + size * (self.k // 64 + self.r // 16 + 2) * 2**-23

    def is_right(self, y: Tensor) -> bool:
        want, tolerance = self.expected()
        return bool(((y.double() - want).abs() <= tolerance).all())  # NaN is wrong too


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).double()
    return (codes - 16 * (codes > 7)) * scales.double().T.repeat_interleave(64, 1)


@pytest.mark.parametrize("scales", DTYPES)
@pytest.mark.parametrize("m", (1, 63, 130))
def test_right_kernel_is_right(library, scales: str, m: int, order: dict, rounding: dict) -> None:
    for k, r in ((64, 0), (128, 16), (320, 48)):
        problem = Problem(m, 128, k, r, scales)
        y, _ = problem.run(library, **order, **rounding)
        assert problem.is_right(y), (k, r)


def test_same_bits_in_either_order_and_with_more_workers(library) -> None:
    problem = Problem(130, 128, 320, 16)
    y, call = problem.run(library)
    assert call.switches > 0
    for mode in ({"reverse": True}, {"workers": 3}, {"race": False}, {"race": False, "trap": False}):
        assert torch.equal(problem.run(library, **mode)[0], y), mode


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(library, bug: str, order: dict) -> None:
    problem = Problem(130, 128, 320, 16)
    if BUGS[bug]:
        with pytest.raises(Fault, match=f"^({BUGS[bug]}): "):
            problem.run(library, bug, **order)
    else:
        assert not problem.is_right(problem.run(library, bug, **order)[0])


@pytest.mark.parametrize("bug", ("no_barrier", "waits_for_one_group_too_few", "refills_a_stage_in_use"))
def test_result_alone_gives_a_missing_wait_away(library, bug: str, order: dict) -> None:
    """With the shadow of shared memory switched off: a copy that has not arrived is NaN."""
    problem = Problem(130, 128, 320, 16)
    assert not problem.is_right(problem.run(library, bug, race=False, trap=False, **order)[0])


def test_missing_swizzle_shows_in_bank_conflicts(library) -> None:
    problem = Problem(130, 128, 320, 16)
    _, right = problem.run(library)
    assert right.ldmatrix_matrices == right.ldmatrix_phases > 0
    y, wrong = problem.run(library, "no_swizzle")
    assert problem.is_right(y)
    assert wrong.ldmatrix_phases == 2 * wrong.ldmatrix_matrices == 2 * right.ldmatrix_matrices
