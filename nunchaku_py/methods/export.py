"""The last stage: a work as the canonical tensors of each of its linears."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NunchakuError
from ..site import SiteTensors, shift_correction
from ..tensor import QTensor
from .error import rows_of
from .work import Context, Work


def export(work: Work, ctx: Context) -> list[SiteTensors]:
    """One SiteTensors per name: codes and up are its own rows, smooth and down = low/smooth are shared.

    The bias is what a shift adds to the linear's own, −S·Σ_k deq(R)[:,k]/smooth[k] in fp32; none without a shift."""
    if work.residual is None:
        raise NunchakuError(f"{work.names[0]}: no step of the recipe has made codes (fit, or absmax, is missing)")
    if not work.site.has_smooth and (work.smooth != 1).any():
        raise NunchakuError(f"{work.names[0]}: a step has smoothed a weight-only site, which stores no smooth")
    shared = (work.smooth.to(ctx.scale_dtype) if work.site.has_smooth else None,
              (work.low / work.smooth).to(ctx.scale_dtype) if work.low.shape[0] else None)
    return [member(work, ctx, rows, *shared) for rows in member_rows(work)]


def member_rows(work: Work) -> Iterator[slice]:
    start = 0
    for count in work.rows:
        yield slice(start, start + count)
        start += count


def member(work: Work, ctx: Context, rows: slice, smooth: Tensor | None, down: Tensor | None) -> SiteTensors:
    weight = owned(rows_of(work.residual, rows))
    up = work.up[rows].to(ctx.scale_dtype) if down is not None else None
    bias = -shift_correction(weight, work.smooth, work.site.shift) if work.site.shift else None
    return SiteTensors(weight, _copy(smooth), _copy(down), up, bias)


def owned(q: QTensor) -> QTensor:
    """A copy that does not keep the stacked tensors of its group alive."""
    return QTensor(q.codes.clone(), q.scales.clone(), q.format, q.k, _copy(q.zeros), _copy(q.channel_scale))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)
