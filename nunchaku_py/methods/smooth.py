"""Smoothing: s_j = max|x_j|^α / max|w_j|^β moves what is hard to quantize between input and weight (SmoothQuant,
arXiv 2211.10438; searched as in SVDQuant, but by the analytic error J instead of by running the layer)."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .error import noise_of, rounding_of
from .lowrank import check_rank, first_factors
from .work import Context, Work, round16, stage

# (α, β): none; activations alone; SmoothQuant's α + β = 1.
CANDIDATES = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (0.3, 0.7), (0.4, 0.6), (0.5, 0.5), (0.6, 0.4),
              (0.7, 0.3), (0.8, 0.2), (0.9, 0.1))
SETS = {"few": CANDIDATES[:1] + CANDIDATES[5:9], "usual": CANDIDATES,
        "many": ((0.0, 0.0), *((k / 20, 0.0) for k in range(1, 20)), *((k / 20, 1 - k / 20) for k in range(1, 20)))}
SPREAD = 2.0**10  # of s to either side of its geometric mean
LARGEST = 2.0**14  # s and 1/s are normal numbers in fp16
NVFP4_TOP = 64.0  # largest calibrated |x̂|: leaves e4m3 scales 40x above it and 500x below before they lose precision
FP16_TOP = 2.0**12  # the same for fp16, where mode a16 keeps x̂ in 16 bit: 16x below its end
Score = Callable[[Work, Context], float]


@stage("rewrite")
def smooth(work: Work, ctx: Context) -> None:
    """Sets smooth (K) to the candidate with the smallest J, which sees a one-shot branch and plain rounding inside."""
    if work.site.has_smooth:  # a weight-only site stores no smooth
        choose(work, ctx, analytic)


def choose(work: Work, ctx: Context, score: Score) -> tuple[float, float]:
    """Sets smooth to the best (α, β) by a score of a work; returns it. A site that stores no smooth keeps 1."""
    check_rank(work)
    if not work.site.has_smooth:
        return CANDIDATES[0]
    tops = work.stats.absmax.float(), _input_absmax(work)
    candidates = SETS[ctx.options.candidates]
    trial = replace(work, weight=_sample_rows(work.weight, ctx.options.search_rows), residual=None)
    found = []
    for alpha, beta in candidates:
        trial.smooth = factor(*tops, alpha, beta, work, ctx)
        found.append(score(trial, ctx))
    best = candidates[found.index(min(found))]
    work.smooth = factor(*tops, *best, work, ctx)
    return best


def analytic(work: Work, ctx: Context) -> float:
    """J with the branch of one cheap SVD."""
    noise = noise_of(work, ctx)
    branch(work, ctx, power=1)
    return torch.stack([rounding_of(work, ctx, rows, noise)[1] for rows in work.chunks()]).sum().item()


def branch(work: Work, ctx: Context, power: int) -> None:
    """The truncated SVD of Ŵ as up and low, unrounded."""
    n, k = work.weight.shape
    rank = min(work.site.rank, n, k)
    work.up, work.low = work.smooth.new_zeros(n, 0), work.smooth.new_zeros(0, k)
    if rank:
        work.up, work.low, _ = first_factors(work, ctx, rank, power)


def factor(x_top: Tensor, w_top: Tensor, alpha: float, beta: float, work: Work, ctx: Context) -> Tensor:
    """s (K) in 16-bit values. A channel that never carried anything, or that no weight reads, keeps s = 1."""
    alive = (x_top > 0) & (w_top > 0)
    if not (alpha or beta) or not alive.any():
        return torch.ones_like(x_top)
    log = torch.where(alive, alpha * x_top.log() - beta * w_top.log(), 0.0)
    log = torch.where(alive, log - log[alive].mean(), 0.0)
    size = math.log(SPREAD)
    smooth = log.clamp(-size, size).exp()
    top = (x_top / smooth)[alive].max().item()
    if work.site.format == "nvfp4":
        smooth = torch.where(alive, smooth * 2.0 ** math.ceil(math.log2(top / NVFP4_TOP)), 1.0)
    elif ctx.scale_dtype == torch.float16 and top > FP16_TOP:
        smooth = torch.where(alive, smooth * 2.0 ** math.ceil(math.log2(top / FP16_TOP)), 1.0)
    return round16(smooth.clamp(1 / LARGEST, LARGEST), ctx.scale_dtype)


def _input_absmax(work: Work) -> Tensor:
    """max_n |W[n, k]| (K), over all linears that share the input."""
    low, high = torch.aminmax(work.weight, dim=0)
    return torch.maximum(low.neg(), high).float()


def _sample_rows(weight: Tensor, rows: int) -> Tensor:
    """At most so many rows, evenly spread, so that every linear of a group is in it."""
    n = weight.shape[0]
    return weight if n <= rows else weight[torch.linspace(0, n - 1, rows, device=weight.device).round().long()]
