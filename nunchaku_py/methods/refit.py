"""The branch once more, now for codes that are fixed: the rank-r L that makes the output error smallest (as QERA,
arXiv 2410.06040, here after the residual's rounding).

    B = Ŵ − Q·diag(d)          d_j = E[x̃_j·x̂_j]/E[x̂_j²]: what of a channel survives the activation's rounding
    L = U_r U_rᵀ B             U_r = leading eigenvectors of BĤBᵀ
"""
from __future__ import annotations

import torch
from torch import Tensor

from .error import output_error, residual_rows, site_inputs
from .gptq import damping
from .lowrank import set_branch
from .svd import orthonormal, random_basis
from .work import Context, Work, stage

ITERATIONS = 1  # the present branch is nearly the answer: more change nothing in five digits


@stage("refine")
def refit(work: Work, ctx: Context) -> None:
    """Replaces up and low, unless the output error on the token sample would grow."""
    rank = work.low.shape[0]
    if rank == 0:
        return
    before, kept = output_error(work, ctx), (work.up, work.low)
    set_branch(work, ctx, *leading(work, ctx, survival(work, ctx)))
    if output_error(work, ctx) > before:
        work.up, work.low = kept


def survival(work: Work, ctx: Context) -> Tensor:
    """d (K); 1 where the channel is silent in the sample."""
    if work.stats.synthetic:
        return torch.ones_like(work.smooth)
    exact, seen = site_inputs(work, ctx)
    energy = exact.square().sum(0)
    return torch.where(energy > 0, (exact * seen).sum(0) / energy.clamp_min(1e-30), 1.0)


def weighed(work: Work, ctx: Context, back: Tensor) -> Tensor:
    """Ĥ·back (K,l), Ĥ damped a little; by its diagonal where no Gram matrix was collected. Nothing K×K is made."""
    if work.stats.gram is None:
        return (work.stats.second.float() / work.smooth.square())[:, None] * back
    inverse = (1.0 / work.smooth)[:, None]
    mean = (work.stats.gram.diagonal().float() * inverse[:, 0].square()).mean()
    return (work.stats.gram.float() @ (back * inverse)).mul_(inverse).add_(back * (damping(work, ctx) * mean))


def target(work: Work, ctx: Context, rows: slice, kept_rate: Tensor) -> Tensor:
    """Rows of B, a new tensor."""
    return work.smoothed(rows).sub_(residual_rows(work, ctx, rows).mul_(kept_rate))


def leading(work: Work, ctx: Context, kept_rate: Tensor) -> tuple[Tensor, Tensor]:
    """U_r (N,r) and U_rᵀB (r,K), by subspace iteration from the present branch."""
    n, k = work.weight.shape
    rank = work.low.shape[0]
    more = random_basis(n, min(ctx.options.oversample, n - rank, k - rank), ctx.seed, work.up)
    columns = torch.cat([work.up, more], 1)
    for turn in range(ITERATIONS + 1):
        columns, back = orthonormal(columns), columns.new_zeros(k, columns.shape[1])  # back = Bᵀ·columns
        for rows in work.chunks():
            back.addmm_(target(work, ctx, rows, kept_rate).T, columns[rows])
        ahead = weighed(work, ctx, back)
        if turn < ITERATIONS:
            columns = torch.cat([target(work, ctx, rows, kept_rate) @ ahead for rows in work.chunks()])
    top = torch.linalg.eigh(back.double().T @ ahead.double()).eigenvectors[:, -rank:].float()
    return columns @ top, top.T @ back.T
