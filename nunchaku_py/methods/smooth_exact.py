"""Smoothing searched by the true output error on the token sample: slower than `smooth`, and the judge of it."""
from __future__ import annotations

from .error import output_error
from .smooth import branch, choose
from .work import Context, Work, stage


@stage("rewrite")
def smooth_exact(work: Work, ctx: Context) -> None:
    """Sets smooth (K) to the candidate with the smallest ‖Y − Ŷ‖, branch and plain rounding inside."""
    if work.site.has_smooth:
        choose(work, ctx, exact)


def exact(work: Work, ctx: Context) -> float:
    branch(work, ctx, ctx.options.power)
    return output_error(work, ctx)
