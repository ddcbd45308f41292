"""LyCORIS' products, and full differences, as up·down: exact where the rank that takes is allowed.

    LoHa  W = (w1_a·w1_b) ∘ (w2_a·w2_b)    rank r·r, by products of rows and of columns
    LoKr  W = w1 ⊗ w2                      rank of w1 · rank of w2, each given whole or as a·b
    diff  W                                its own rank

For convolutions a matrix has the columns (C, kh, kw); there LyCORIS may give a·b by a core t (r, r, kh, kw) as well.
Products of 16-bit numbers are exact in the fp32 that is used.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..errors import NunchakuError
from .compress import NUMERICAL, Spectrum, spectrum_of, spectrum_of_kron, spectrum_of_matrix
from .delta import some

Factors = tuple[Tensor, Tensor]  # up (N, r), down (r, K)
_MEASURED = 3  # refusals whose spectrum is computed: hundreds of large ones would take minutes, to be refused anyway


class Misfit(NunchakuError):
    """Shapes that are not those of the module."""


@dataclass(frozen=True)
class Refusal:
    module: str
    kind: str
    needed: int
    kept: float


class Refused(NunchakuError):
    """Raised for one module, and kept by the Fit, which has the sentence about all of them."""


@dataclass
class Fit:
    """How much rank a module may get, and what came of it."""

    most: int
    tolerance: float
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)
    kept: dict[str, list[float]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def factors(self, module: str, kind: str, was: str, rank: int, exact: Callable[[], Factors],
                spectrum: Callable[[], Spectrum]) -> Factors:
        """`exact()`, of this rank, or what `spectrum()` offers, which may be too little."""
        if rank <= self.most:
            self.changed[kind, f"{was} became {rank}"] += 1
            return exact()
        if len(self.refused) == _MEASURED:
            self.unmeasured.append(module)
            raise Refused(module)
        found = spectrum()
        needed = found.rank(NUMERICAL)
        if needed <= self.most:
            self.changed[kind, f"{was} became {needed}"] += 1
            return found.take(needed)
        rank = found.rank(self.tolerance)
        if not self.tolerance or rank > self.most:
            self.refused.append(Refusal(module, kind, needed, 1 - found.lost(self.most)))
            raise Refused(module)
        self.kept.setdefault(kind, []).append(1 - found.lost(rank))
        return found.take(rank)

    def notes(self) -> list[str]:
        return [*(f"{kind}: {change}" + (f" ({count} modules)" if count > 1 else "")
                  for (kind, change), count in sorted(self.changed.items())),
                *(f"{len(kept)} {kind} module{'s' * (len(kept) > 1)}: kept {100 * min(kept):.4g} % of the norm"
                  for kind, kept in sorted(self.kept.items()))]

    def check(self) -> None:
        if self.refused:
            needed, kept = max(r.needed for r in self.refused), min(r.kept for r in self.refused)
            kinds = " and ".join(sorted({r.kind for r in self.refused}))
            names = some([*(r.module for r in self.refused), *self.unmeasured])
            raise NunchakuError(
                f"{names}: as low-rank products ({kinds}) these changes need rank {needed}, and rank {self.most} would "
                f"keep {100 * kept:.3g} % of the norm. Allow more by max_rank={needed}, or less of it by "
                f"tolerance={_rounded_up(1 - kept)}"
            )


def _rounded_up(share: float) -> str:
    return f"{min(1.0, share + 0.0005):.3f}"


# ------------------------------------------------------------------------------------------------------------- LoHa
def loha(parts: Mapping[str, Tensor], shape: tuple[int, ...], module: str, fit: Fit) -> tuple[Factors, int]:
    """(factors, the file's rank): row n of up is w1_a[n] ⊗ w2_a[n], column k of down w1_b[:, k] ⊗ w2_b[:, k]."""
    first, second = (_pair(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", shape) for n in (1, 2))
    for up, down in (first, second):
        _expect(module, "LoHa", (shape[0], prod(shape[1:])), (up.shape[0], down.shape[1]))

    def exact() -> Factors:
        up = (first[0][:, :, None] * second[0][:, None, :]).flatten(1)
        return up, (first[1][:, None] * second[1][None]).flatten(0, 1)

    rank, other = first[1].shape[0], second[1].shape[0]
    was = f"rank {rank}"
    return fit.factors(module, "LoHa", was, rank * other, exact, lambda: spectrum_of(*exact())), rank


def _pair(parts: Mapping[str, Tensor], a: str, b: str, core: str, shape: tuple[int, ...]) -> Factors:
    """a (N, r) and b (r, K) in fp32. With a core t (r, r, kh, kw) the file has a as (r, N) and b as (r, C), and
    W = Σ_ij a[i, n] · t[i, j] · b[j, c]."""
    up, down = parts[a].float(), parts[b].float()
    if core in parts:
        _chain(core, parts[core].shape[:2], (up.shape[0], down.shape[0]))
        return up.T.contiguous(), torch.einsum("ijhw,jc->ichw", parts[core].float(), down).flatten(1)
    down = down.flatten(1)
    _chain(b, down.shape[:1], up.shape[1:2])
    return up.flatten(1), down


# ------------------------------------------------------------------------------------------------------------- LoKr
def lokr(parts: Mapping[str, Tensor], shape: tuple[int, ...], module: str, fit: Fit) -> tuple[Factors, int | None]:
    """(factors, the file's rank, or None where both matrices are whole: LyCORIS then scales by nothing)."""
    first, second = (_given(parts, f"lokr_w{n}", shape) for n in (1, 2))
    size = tuple(first.shape[axis] * second.shape[axis] for axis in (0, 1))
    _expect(module, "LoKr", (shape[0], prod(shape[1:])), size)

    def exact() -> Factors:
        (up1, down1), (up2, down2) = first.factors(), second.factors()
        return torch.kron(up1, up2), torch.kron(down1, down2)

    file_rank = second.file_rank or first.file_rank
    was = "whole matrices" if file_rank is None else f"rank {file_rank}"
    factors = fit.factors(module, "LoKr", was, first.rank * second.rank, exact,
                          lambda: spectrum_of_kron(first.matrix(), second.matrix()))
    return factors, file_rank


@dataclass(frozen=True)
class Given:
    """One of LoKr's two matrices: whole, or as a·b, of which the smaller rank is taken."""

    whole: Tensor | None
    pair: Factors | None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.whole.shape) if self.whole is not None else (self.pair[0].shape[0], self.pair[1].shape[1])

    @property
    def file_rank(self) -> int | None:
        return None if self.pair is None else self.pair[1].shape[0]

    @property
    def rank(self) -> int:
        return min(*self.shape, self.file_rank or min(self.shape))

    def matrix(self) -> Tensor:
        return self.whole if self.whole is not None else self.pair[0] @ self.pair[1]

    def factors(self) -> Factors:
        if self.pair is not None and self.file_rank <= min(self.shape):
            return self.pair
        return _with_identity(self.matrix())


def _given(parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Given:
    if name in parts:
        return Given(parts[name].float().flatten(1), None)
    return Given(None, _pair(parts, f"{name}_a", f"{name}_b", name.replace("w", "t"), shape))


# --------------------------------------------------------------------------------------------------------------- diff
def full(matrix: Tensor, shape: tuple[int, ...], module: str, fit: Fit) -> Factors:
    _expect(module, "diff", tuple(shape), tuple(matrix.shape))
    matrix = matrix.flatten(1)
    return fit.factors(module, "full difference", "whole matrices", min(matrix.shape),
                       lambda: _with_identity(matrix), lambda: spectrum_of_matrix(matrix))


def _with_identity(matrix: Tensor) -> Factors:
    """W·1 or 1·W: no number of W changes."""
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (identity, matrix) if rows <= columns else (matrix, identity)


def _expect(module: str, what: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if expected != got:
        raise Misfit(f"{module}: expected a change of {expected}, got {what} of {got}")


def _chain(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise Misfit(f"{name}: expected rank {', '.join(map(str, expected))}, got {', '.join(map(str, got))}")
