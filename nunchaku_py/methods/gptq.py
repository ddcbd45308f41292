"""GPTQ on the residual (Frantar et al. 2022, arXiv 2210.17323): each column's rounding error is pushed onto the columns
not yet rounded, as the Gram matrix of the input says they can take it. Group scales are fixed beforehand.

    H⁻¹ = UᵀU, U upper:   e_j = (R_j − deq(q_j))/U_jj ;   R_i ← R_i − U_ji·e_j for i > j
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NunchakuError
from ..formats import Format, encode, pack_nibbles, round_codes_, row_chunks
from ..tensor import QTensor
from . import fast
from .error import noise_of
from .fit import quantize_remainder
from .work import Context, Work, stage

SMALL = 256  # a triangular matrix of so many rows is inverted at once
RETRIES = 6  # each with ten times the damping
LEAF = 8  # columns that torch code rounds one by one before a matrix product takes their errors to the others


@stage("refine")
def gptq(work: Work, ctx: Context) -> None:
    """Replaces the codes of the residual at its scales (of `fit`, or absmax ones), all N rows at once."""
    if not _possible(work, ctx):
        return
    residual = work.residual or quantize_remainder(work, ctx, search=False)
    order, upper = ordered_factor(work, ctx)
    columns = upper.new_empty(upper.shape[0], work.weight.shape[0])
    for rows in work.chunks():
        columns[:, rows] = work.remainder(rows).T[order]
    sweep(columns, torch.empty_like(columns), Grid.of(residual, order), upper, 0)
    work.residual = with_values(residual, columns, order)


def _possible(work: Work, ctx: Context) -> bool:
    """Whether a Gram matrix says enough. A W4A16 site (few rows: one per image and step) may do without, W4A4 not."""
    if work.stats.gram is None and work.site.kind == "w4a16":
        return False
    if work.stats.gram is None:
        raise NunchakuError(f"{work.names[0]}: gptq needs the Gram matrix of the input, which was not collected")
    if work.site.format == "uint4":
        raise NunchakuError(f"{work.names[0]}: gptq rounds int4 and nvfp4, not uint4")
    enough = work.site.kind == "w4a4" or work.stats.rows >= work.weight.shape[1]
    if not enough:
        ctx.log(f"{work.names[0]}: gptq left out, {work.stats.rows} rows of calibration are too few for "
                f"{work.weight.shape[1]} channels")
    return enough


def ordered_factor(work: Work, ctx: Context) -> tuple[Tensor, Tensor]:
    """Channels from the strongest to the weakest, and U in that order. Beside the Gram matrix it makes two and a half
    of its size."""
    inverse = 1.0 / work.smooth
    diagonal = work.stats.gram.diagonal() * inverse * inverse
    diagonal = diagonal + noise_of(work, ctx).rounding  # (R−Q) multiplies the rounding noise of the input as well
    order = diagonal.argsort(descending=True, stable=True)
    back = order.flip(0)
    flipped = work.stats.gram[back[:, None], back].float()
    flipped.mul_(inverse[back]).mul_(inverse[back, None]).diagonal().copy_(diagonal[back])
    return order, inverse_factor(flipped, damping(work, ctx), work.names[0])


def damping(work: Work, ctx: Context) -> float:
    """Share of the mean diagonal. What a Gram matrix of few rows says of K channels is mostly chance: K/rows adds."""
    return ctx.options.damping + ctx.options.scarcity * work.weight.shape[1] / max(work.stats.rows, 1)


def inverse_factor(flipped: Tensor, share: float, name: str) -> Tensor:
    """Upper U with (H + λI)⁻¹ = UᵀU, λ = share·mean diag, by one Cholesky of the flipped matrix H[::-1, ::-1].

    If that fails, it is tried again with more damping. U takes the place of H: K×K matrices are what this costs."""
    unit, added = share * flipped.diagonal().mean().clamp_min(1e-30).item(), 0.0
    for attempt in range(RETRIES):
        flipped.diagonal().add_(unit * 10**attempt - added)
        added = unit * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed.item() and lower.diagonal().isfinite().all():
            invert_lower_(lower)
            for rows in row_chunks(*lower.shape):  # back into the memory that is there
                flipped[rows] = lower[len(lower) - rows.stop:len(lower) - rows.start].flip(0, 1)
            return flipped
    raise NunchakuError(f"{name}: the Gram matrix of the input is not positive definite, or not finite, even with "
                        f"damping {share * 10 ** (RETRIES - 1):g}")


def invert_lower_(lower: Tensor) -> None:
    """L⁻¹ in place of L (K,K), by halves: [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹BA⁻¹ C⁻¹]."""
    if len(lower) <= SMALL:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = len(lower) // 2
    invert_lower_(lower[:half, :half])
    invert_lower_(lower[half:, half:])
    lower[half:, :half] = (lower[half:, half:] @ lower[half:, :half]).neg_() @ lower[:half, :half]


@dataclass(frozen=True)
class Grid:
    """Step sizes (G,N) of a QTensor, addressed by columns in the order of rounding."""

    format: Format
    step: Tensor
    inverse: Tensor  # 0 where the step is
    group: Tensor  # int64, of each column

    @staticmethod
    def of(q: QTensor, order: Tensor) -> Grid:
        step = q.scales.float() if q.channel_scale is None else q.scales.float() * q.channel_scale[:, None]
        step = step.T.contiguous()
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        return Grid(q.format, step, inverse, order // (q.format.group or q.k))

    def round(self, column: Tensor, group: int) -> Tensor:
        """A column (N) at the nearest values its groups can store."""
        return round_codes_(column * self.inverse[group], self.format).mul_(self.step[group])


def sweep(columns: Tensor, errors: Tensor, grid: Grid, upper: Tensor, first: int) -> None:
    """Rounds columns (k,N), the ones from `first` on, in place; errors (k,N) receives e.

    Halves itself, so that nearly all the work is in matrix products."""
    together = fast.sweep_columns(columns)
    if len(columns) <= (together or LEAF):
        groups = grid.group[first:first + len(columns)]
        if together:
            return fast.sweep(columns, errors, upper, grid.step, grid.inverse, groups, grid.format)
        return _round_one_by_one(columns, errors, grid, upper, groups.tolist())
    half = len(columns) // 2
    sweep(columns[:half], errors[:half], grid, upper[:half, :half], first)
    columns[half:].addmm_(upper[:half, half:].T, errors[:half], alpha=-1)
    sweep(columns[half:], errors[half:], grid, upper[half:, half:], first + half)


def _round_one_by_one(columns: Tensor, errors: Tensor, grid: Grid, upper: Tensor, groups: list[int]) -> None:
    diagonal = upper.diagonal().tolist()
    for j, column in enumerate(columns):
        rounded = grid.round(column, groups[j])
        torch.sub(column, rounded, out=errors[j]).div_(diagonal[j])
        columns[j + 1:].addr_(upper[j, j + 1:], errors[j], alpha=-1)
        column.copy_(rounded)


def with_values(residual: QTensor, columns: Tensor, order: Tensor) -> QTensor:
    """The QTensor whose values are columns (K,N), put back from the order of rounding."""
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    values = columns[back].T
    if residual.channel_scale is not None:
        values = values / residual.channel_scale[:, None]
    return replace(residual, codes=pack_nibbles(encode(values, residual.scales, residual.format)))
