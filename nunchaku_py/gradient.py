"""Gradients through a quantized linear: to its input. Its own weights are not trained; adapters beside it are."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """Rounding has no useful gradient: backward takes the one of the 16-bit linear that the site stands for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, site: Any) -> Tensor:
        ctx.site, ctx.folded = site, site.folded()
        if ctx.folded is not None:  # what is folded may change until backward
            ctx.folded = (ctx.folded[0].clone(), ctx.folded[1].clone(), ctx.folded[2])
        return site.multiply(site.quantize_input(rows), rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.float() @ ctx.site.weight_with(ctx.folded)).to(grad.dtype), None


def wants_gradient(rows: Tensor) -> bool:
    return rows.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
