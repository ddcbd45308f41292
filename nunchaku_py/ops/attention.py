"""attention: softmax(q·kᵀ/√D)·v."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, expect, expect_that
from .registry import Op


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o (B,H,T,D) = softmax(q·kᵀ/√D)·v over q (B,H,T,D), k and v (B,H,S,D), rounded to the dtype of q."""
    return F.scaled_dot_product_attention(q, k, v).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    expect_that(q.ndim == 4, f"q: expected (batch, heads, tokens, head dim), got {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    keys = (batch, heads, k.shape[2] if k.ndim == 4 else 0, dim)
    meaning = "(batch, heads, keys, head dim)"
    expect(q, (
        ("q", q, "(batch, heads, tokens, head dim)", q.shape, FLOATS),
        ("k", k, meaning, keys, (q.dtype,)),
        ("v", v, meaning, keys, (q.dtype,)),
    ))


def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


attention = Op(attention, _fake, _check)
