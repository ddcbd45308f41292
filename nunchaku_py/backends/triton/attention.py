"""attention by the Triton kernels: q and k in int8, P·V in FP8 or 16 bit."""
from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ...ops.spec import AttentionSpec, Products
from . import device as gpu
from .device import OLDEST_FP8, kernels, refuses_dtype

HEAD_DIMS = (64, 128)


def multiplies_fp8(device: torch.device) -> bool:
    return gpu.capability_of(device) >= OLDEST_FP8


def refuses_head(dtype: torch.dtype, dim: int) -> str | None:
    dims = " or ".join(map(str, HEAD_DIMS))
    return refuses_dtype(dtype) or (None if dim in HEAD_DIMS else f"it takes heads of {dims} channels, not {dim}")


def refuses_products(products: Products, device: torch.device) -> str | None:
    if products != "fp8" or multiplies_fp8(device):
        return None
    return "FP8 needs compute capability {}.{}, this GPU has {}.{}".format(*OLDEST_FP8, *gpu.capability_of(device))


def refuses_kind(device: torch.device, dtype: torch.dtype, dim: int, products: Products) -> str | None:
    """What does not depend on tensors, but on what they are like."""
    return gpu.refuses_place(device) or refuses_head(dtype, dim) or refuses_products(products, device)


def refuses_memory(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What is asked of the tensors themselves."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradients"
    apart = [name for name, tensor in (("q", q), ("k", k), ("v", v)) if tensor.stride(-1) != 1]
    if apart:
        return f"the channels of {apart[0]} are not side by side in memory"
    return None if k.shape[2] else "there are no keys"


def _refuses(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> str | None:
    return refuses_kind(q.device, q.dtype, q.shape[-1], spec.products) or refuses_memory(q, k, v)


@ops.attention.backend("triton", _refuses)
def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    fp8 = spec.products != "16bit" and multiplies_fp8(q.device)
    return kernels("attention").attention(q, k, v, spec, fp8)
