"""The smallest rank that holds a product up·down, or as much of it as is asked for."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUMERICAL = 1e-6  # a share of the norm that fp32 factors do not hold apart from none
_NOTHING = 1e-12  # … nor fp64, in which the decompositions are done


@dataclass(frozen=True)
class Spectrum:
    """A matrix W (N, K): its singular values, descending in fp64; take(r) is its best up (N, r) and down (r, K)."""

    values: Tensor
    take: Callable[[int], tuple[Tensor, Tensor]]

    def lost(self, rank: int) -> float:
        """‖W − up·down‖ / ‖W‖ in the Frobenius norm, where up·down has this rank."""
        whole = float(self.values.square().sum())
        return (float(self.values[rank:].square().sum()) / whole) ** 0.5 if whole else 0.0

    def rank(self, tolerance: float) -> int:
        """The smallest, at least 1, at which no more than this share is lost."""
        energy = self.values.square().flip(0).cumsum(0).flip(0)  # what ranks 0, 1, 2 … leave out
        lost = (energy / energy[0]).sqrt() if energy[0] else energy
        return max(1, int((lost > max(tolerance, _NOTHING)).sum()))


def shrink(up: Tensor, down: Tensor, most: int | None, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """(up', down', lost): the smallest rank at which `lost` = ‖up·down − up'·down'‖ / ‖up·down‖ is at most `tolerance`,
    and at most `most`, whatever is lost by that. up (N, r), down (r, K); the results are fp32."""
    spectrum = spectrum_of(up, down)
    rank = min(spectrum.rank(tolerance), most or spectrum.values.numel())
    return *spectrum.take(rank), spectrum.lost(rank)


def spectrum_of(up: Tensor, down: Tensor) -> Spectrum:
    """Of up·down, by way of the (r, r) product of their triangular factors where that is the smaller matrix."""
    up, down = up.double(), down.double()
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return spectrum_of_matrix(up @ down)
    (left, left_core), (right, right_core) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    core = spectrum_of_matrix(left_core @ right_core.T)

    def take(rank: int) -> tuple[Tensor, Tensor]:
        core_up, core_down = core.take(rank)
        return (left @ core_up.double()).float(), (core_down.double() @ right.T).float()

    return Spectrum(core.values, take)


def spectrum_of_matrix(matrix: Tensor) -> Spectrum:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Spectrum(values, lambda rank: _balanced(left[:, :rank], values[:rank], right[:rank]))


def spectrum_of_kron(first: Tensor, second: Tensor) -> Spectrum:
    """Of first ⊗ second: its singular values are the products of theirs, so neither it nor its SVD is ever made."""
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(m.double(), full_matrices=False) for m in (first, second))
    values, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)

    def take(rank: int) -> tuple[Tensor, Tensor]:
        i, j = order[:rank] // s2.numel(), order[:rank] % s2.numel()
        left = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
        right = (v1[i, :, None] * v2[j, None, :]).flatten(1)
        return _balanced(left, values[:rank], right)

    return Spectrum(values, take)


def _balanced(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Each factor gets the root of the singular values, so that neither leaves the range of 16-bit types."""
    root = values.sqrt()
    return (left * root).float(), (root[:, None] * right).float()
