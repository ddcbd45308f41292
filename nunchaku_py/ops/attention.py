"""attention: softmax(scale·q·kᵀ)·v."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, expect, expect_that
from .registry import Op
from .spec import AttentionSpec


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """o (B,H,T,D) = softmax(scale·q·kᵀ)·v over q (B,H,T,D), k and v (B,H,S,D), rounded to the dtype of q.

    o lies in memory as torch.empty_like(q) does: where q is a view of (B,T,H,D), as diffusers' are, so is o.
    """
    found = F.scaled_dot_product_attention(q, k, v, scale=spec.scale_of(q.shape[-1]))
    o = torch.empty_like(q)
    return found if found.stride() == o.stride() else o.copy_(found)


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
    return torch.empty_like(q)


attention = Op(attention, _fake, _check)
