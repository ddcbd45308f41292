"""Truncated SVD by subspace iteration: one pass over row chunks of the matrix per step, nothing of its size is stored.

A pass takes a basis V (K,l) and gives Y = A·V and Z = AᵀY; the best factors with columns in range(Y) follow from these
two thin matrices alone: Y = P·C, B = PᵀA = C⁻ᵀZᵀ. The l×l algebra is fp64, so squared condition numbers are harmless.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

RowsOf = Callable[[slice], Tensor]


class Factors(NamedTuple):
    up: Tensor  # (N,r), orthonormal columns
    low: Tensor  # (r,K)
    basis: Tensor  # (K,l) right vectors to start the next pass from


class Pass:
    """Collects Y and Z while somebody walks over the rows of A."""

    def __init__(self, n: int, basis: Tensor) -> None:
        self.basis, self.y, self.z = basis, basis.new_empty(n, basis.shape[1]), torch.zeros_like(basis)

    def add(self, rows: slice, a: Tensor) -> None:
        torch.mm(a, self.basis, out=self.y[rows])
        self.z.addmm_(a.T, self.y[rows])

    def factors(self, rank: int) -> Factors:
        y, z = self.y.double(), self.z.double()
        whiten = inverse_root(y.T @ y)
        b = whiten @ z.T  # (l,K): coordinates of A in the orthonormal columns y @ whiten
        energy, turn = torch.linalg.eigh(b @ b.T)
        turn = turn.flip(1)  # largest first
        top = turn[:, :rank]
        right = b.T @ (turn * energy.flip(0).clamp_min(1e-300).rsqrt())
        return Factors((y @ (whiten @ top)).float(), (top.T @ b).float(), right.float())


def inverse_root(gram: Tensor) -> Tensor:
    """A symmetric fp64 gram^(−1/2); directions the matrix does not have are dropped."""
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1].clamp_min(1e-300) * 1e-13
    return (vectors * torch.where(keep, values, 1.0).rsqrt() * keep) @ vectors.T


def random_basis(k: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """(K,l) gaussian, the same on every device."""
    generator = torch.Generator().manual_seed(seed)  # the CPU's, so that every device starts from the same numbers
    return torch.randn(k, columns, generator=generator, device="cpu").to(like.device)


def orthonormal(x: Tensor) -> Tensor:
    wide = x.double()
    return (wide @ inverse_root(wide.T @ wide)).float()


def truncated(rows_of: RowsOf, chunks: Callable[[], Iterable[slice]], n: int, basis: Tensor, rank: int,
              power: int) -> Factors:
    """Best rank-r factors of A (N,K), from a starting basis and `power` power steps."""
    for _step in range(power + 1):
        walk = Pass(n, orthonormal(basis))
        for rows in chunks():
            walk.add(rows, rows_of(rows))
        basis = walk.z
    return walk.factors(rank)
