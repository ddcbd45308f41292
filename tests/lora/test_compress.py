"""The smallest rank that holds what is asked for."""

from __future__ import annotations

import pytest
import torch

from nunchaku_py.lora.compress import shrink, spectrum_of, spectrum_of_kron, spectrum_of_matrix
from tests.lora.writers import normal


def product(rows: int, columns: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """up·down with these singular values, of larger inner size than they are many."""
    left, right = (torch.linalg.qr(normal(size, size, values.numel()).double())[0] for size in (rows, columns))
    mix = torch.linalg.qr(normal(7, values.numel() + 3, values.numel()).double())[0]
    return (left * values) @ mix.T, mix @ right.T


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (9, 200), (11, 10)])
def test_the_rank_is_the_smallest(shape: tuple[int, int]) -> None:
    values = torch.tensor([8.0, 4, 2, 1, 0.5]).double()
    up, down = product(*shape, values)
    norm = values.square().sum().sqrt()
    for rank in range(1, 5):
        share = float(values[rank:].square().sum().sqrt() / norm)
        small_up, small_down, lost = shrink(up, down, None, share * 1.001)
        assert small_up.shape == (shape[0], rank) and small_down.shape == (rank, shape[1])
        assert small_up.dtype == small_down.dtype == torch.float32
        error = (up @ down - small_up.double() @ small_down.double()).norm() / norm
        assert lost == pytest.approx(share) and float(error) == pytest.approx(share, abs=1e-6)
        assert shrink(up, down, None, share * 0.999)[0].shape[1] == rank + 1
        assert shrink(up, down, rank, 0.0)[2] == pytest.approx(share)


def test_nothing_is_lost_of_a_lower_rank() -> None:
    up, down = product(30, 40, torch.tensor([3.0, 2, 1]).double())
    small_up, small_down, lost = shrink(up, down, None, 0.0)
    assert small_up.shape[1] == 3 and lost < 1e-12
    assert torch.allclose(small_up @ small_down, (up @ down).float(), atol=1e-5)


def test_the_norm_is_shared_by_both_factors() -> None:
    up, down, _ = shrink(*product(30, 40, torch.tensor([1e6, 1e5]).double()), None, 0.0)
    assert float(up.norm() / down.norm()) == pytest.approx(1)


def test_zeros_have_rank_one() -> None:
    up, down, lost = shrink(torch.zeros(6, 3), torch.zeros(3, 5), None, 0.0)
    assert (up.shape, down.shape, lost) == ((6, 1), (1, 5), 0.0) and not (up @ down).any()


def test_the_same_bits_every_time() -> None:
    up, down = normal(1, 64, 16).bfloat16(), normal(2, 16, 48).bfloat16()
    first, second = shrink(up, down, 8, 0.0), shrink(up.clone(), down.clone(), 8, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))


@pytest.mark.parametrize("shapes", [((4, 4), (6, 5)), ((2, 7), (9, 3)), ((1, 3), (8, 2))])
def test_a_kronecker_product_needs_no_svd_of_its_own(shapes: tuple) -> None:
    first, second = normal(1, *shapes[0]), normal(2, *shapes[1])
    dense = torch.kron(first.double(), second.double())
    spectrum, want = spectrum_of_kron(first, second), spectrum_of_matrix(dense)
    count = spectrum.values.numel()
    assert torch.allclose(spectrum.values, want.values[:count]) and want.values[count:].sum() < 1e-6
    for rank in range(1, count + 1):
        up, down = spectrum.take(rank)
        error = (dense - up.double() @ down.double()).norm() / dense.norm()
        assert float(error) == pytest.approx(want.lost(rank), abs=1e-6)


def test_wide_factors_are_multiplied_first() -> None:
    up, down = normal(1, 6, 50), normal(2, 50, 7)
    assert spectrum_of(up, down).values.numel() == 6
