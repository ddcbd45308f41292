"""The low-rank branch of SVDQuant: L ← SVD_r(Ŵ − Q), Q ← RTN(Ŵ − L), alternately (Li et al. 2024, arXiv 2411.05007)."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NunchakuError
from .error import Noise, noise_of, rounding_of
from .svd import Factors, Pass, random_basis, truncated
from .work import Context, Work, round16, stage


@stage("factor")
def lowrank(work: Work, ctx: Context) -> None:
    """Sets up (N,R) and low (R,K). Every round costs one pass over Ŵ; the factors with the smallest J are kept."""
    rank = check_rank(work)
    if rank == 0:
        return
    noise, factors = noise_of(work, ctx), first_factors(work, ctx, rank, ctx.options.power)
    best, kept, waited = float("inf"), factors, 0
    for _ in range(ctx.options.rounds):
        cost, following = alternate(work, ctx, factors, noise)
        waited = 0 if cost < best * (1 - ctx.options.gain) else waited + 1
        best, kept = (cost, factors) if cost < best else (best, kept)
        if waited >= ctx.options.patience:
            break
        factors = following
    set_branch(work, ctx, kept.up, kept.low)


def check_rank(work: Work) -> int:
    rank, limit = work.site.rank, min(work.weight.shape)
    if rank > limit:
        raise NunchakuError(f"{work.names[0]}: rank {rank} is more than a weight of {tuple(work.weight.shape)} has")
    return rank


def first_factors(work: Work, ctx: Context, rank: int, power: int) -> Factors:
    """The truncated SVD of Ŵ itself."""
    n, k = work.weight.shape
    columns = min(rank + ctx.options.oversample, n, k)
    return truncated(work.smoothed, work.chunks, n, random_basis(k, columns, ctx.seed, work.weight), rank, power)


def alternate(work: Work, ctx: Context, factors: Factors, noise: Noise) -> tuple[float, Factors]:
    """J of these factors with plain rounding, and the factors one subspace step of Ŵ − Q further."""
    walk, costs = Pass(work.weight.shape[0], factors.basis), []
    trial = replace(work, up=factors.up, low=factors.low)
    for rows in work.chunks():
        difference, cost = rounding_of(trial, ctx, rows, noise)
        walk.add(rows, difference)
        costs.append(cost)
    return torch.stack(costs).sum().item(), walk.factors(factors.low.shape[0])


def set_branch(work: Work, ctx: Context, up: Tensor, low: Tensor) -> None:
    """Balances the pair, and rounds it to what the file will hold before anybody computes the residual from it."""
    size = low.norm(dim=1).clamp_min(1e-12).sqrt()
    work.up = round16(up * size, ctx.scale_dtype)
    work.low = round16(low / size[:, None] / work.smooth, ctx.scale_dtype) * work.smooth
