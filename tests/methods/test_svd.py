import pytest
import torch

from nunchaku_py.methods.svd import orthonormal, random_basis, truncated


def chunks_of(n):
    return lambda: [slice(i, min(i + 40, n)) for i in range(0, n, 40)]


def approximate(a, rank, power=2, extra=8):
    basis = random_basis(a.shape[1], min(rank + extra, *a.shape), 0, a)
    return truncated(lambda rows: a[rows], chunks_of(len(a)), len(a), basis, rank, power)


@pytest.mark.parametrize("power, bar", [(2, 1.02), (10, 1.003)])
def test_flat_spectrum_is_the_worst_case_and_power_steps_mend_it(power, bar):
    a = torch.randn(384, 256, generator=torch.Generator().manual_seed(0))
    factors = approximate(a, 32, power)
    best = torch.linalg.svdvals(a)[32:].square().sum().sqrt()
    assert (a - factors.up @ factors.low).norm() <= bar * best
    assert torch.allclose(factors.up.T @ factors.up, torch.eye(32), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_matrix_of_low_rank_is_reproduced_at_any_scale(scale):
    g = torch.Generator().manual_seed(1)
    a = scale * torch.randn(90, 5, generator=g) @ torch.randn(5, 70, generator=g)
    factors = approximate(a, 16)
    assert (a - factors.up @ factors.low).norm() <= 1e-5 * a.norm()


def test_full_rank_and_zeros():
    a = torch.randn(24, 50, generator=torch.Generator().manual_seed(2))
    factors = approximate(a, 24)
    assert torch.allclose(factors.up @ factors.low, a, atol=1e-4)
    zero = approximate(torch.zeros(24, 50), 4)
    assert not (zero.up @ zero.low).any() and zero.basis.isfinite().all()


def test_orthonormal_drops_what_is_not_there():
    x = torch.ones(10, 3)
    assert torch.allclose(orthonormal(x).T @ orthonormal(x), torch.full((3, 3), 1 / 3), atol=1e-6)
