"""Sites between which the smoothing s of an attention's output projection was moved, into the layer that comes before.

    output divided (to_v):    W' = W / s, by rows; bias' = bias / s
    input divided (to_out):   W' = W · s, by columns, of an input that arrives as x / s

The model is the same and its linears are not: what was made for those of the original model (an adapter, a norm) is
brought here to what is stored, or that back. s is the site's `divisor`.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor


def as_read(rows: Tensor, site: Any) -> Tensor:
    """(r,K): factors that read x → factors that read what arrives; in fp32 where it is another."""
    return rows.float() * site.divisor.data.float() if site.site.divided == "input" else rows


def as_given(columns: Tensor, site: Any) -> Tensor:
    """(N,r): factors that give a part of y → of what the site gives; in fp32 where it is another."""
    return columns.float() / site.divisor.data.float()[:, None] if site.site.divided == "output" else columns


def undivided(tensor: Tensor | None, site: Any) -> Any:
    """A weight (N,K), or a bias (N) if there is one → as it was, in fp32."""
    if tensor is None or not site.site.divided:
        return tensor
    divisor, is_bias = site.divisor.data.float(), tensor.ndim == 1
    if site.site.divided == "output":
        return tensor.float() * (divisor if is_bias else divisor[:, None])
    return tensor if is_bias else tensor.float() / divisor
