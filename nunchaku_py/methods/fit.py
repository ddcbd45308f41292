"""Scales and codes of the residual by a least-squares search over scales, group by group."""
from __future__ import annotations

import torch

from ..tensor import QTensor
from .work import Context, Work, stage


@stage("fit")
def fit(work: Work, ctx: Context) -> None:
    """residual ← argmin ‖R − deq‖² over the candidate scales of each group."""
    work.residual = quantize_remainder(work, ctx, search=True)


@stage("fit")
def absmax(work: Work, ctx: Context) -> None:
    """residual ← round-to-nearest with absmax scales."""
    work.residual = quantize_remainder(work, ctx, search=False)


def quantize_remainder(work: Work, ctx: Context, search: bool) -> QTensor:
    fmt = work.site.weight_format
    return joined([QTensor.quantize(work.remainder(rows), fmt, ctx.scale_dtype, search=search)
                   for rows in work.chunks()])


def joined(parts: list[QTensor]) -> QTensor:
    """One QTensor of rows that were quantized chunk by chunk."""
    first = parts[0]

    def cat(name: str) -> torch.Tensor | None:
        return None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts])
    return QTensor(cat("codes"), cat("scales"), first.format, first.k, cat("zeros"), cat("channel_scale"))
