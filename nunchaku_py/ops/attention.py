"""attention: softmax(scale·q·kᵀ)·v."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, expect, expect_that
from .registry import Op
from .spec import AttentionSpec


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """o (B,H,T,D) = softmax(scale·q·kᵀ)·v over q (B,H,T,D), k and v (B,H,S,D), rounded to the dtype of q.

    o is dense, as (B,T,H,D) where the heads of a token are nearer in q than its tokens, as in diffusers; else as
    (B,H,T,D).
    """
    found = F.scaled_dot_product_attention(q, k, v, scale=spec.scale_of(q.shape[-1]))
    o = empty_output(q)
    return found if found.stride() == o.stride() else o.copy_(found)


def empty_output(q: Tensor) -> Tensor:
    """o (B,H,T,D), of which the strides follow from those of q (torch.empty_like's do not where a size is 1)."""
    if q.stride(1) >= q.stride(2):
        return q.new_empty(q.shape)
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
    expect_that(q.ndim == 4, f"q: expected (batch, heads, tokens, head dim), got {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    keys = (batch, heads, k.shape[2] if k.ndim == 4 else 0, dim)
    meaning = "(batch, heads, keys, head dim)"
    expect(q, (
        ("q", q, "(batch, heads, tokens, head dim)", q.shape, FLOATS),
        ("k", k, meaning, keys, (q.dtype,)),
        ("v", v, meaning, keys, (q.dtype,)),
    ))


def _fake(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    return empty_output(q)


attention = Op(attention, _fake, _check)
