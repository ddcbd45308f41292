"""What is read of a file's tensors, each refusal with the key's name."""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import NunchakuError

State = Mapping[str, Tensor]


def weight(state: State, key: str, scale: str | None = None) -> Tensor:
    """Finite floating point numbers with the file's bits, times those of the key `scale` where the file has one."""
    tensor = state[key]
    if not tensor.is_floating_point():
        raise NunchakuError(f"{key}: expected floating point numbers, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.numel() == 0:
        raise NunchakuError(f"{key}: has no values, shape {tuple(tensor.shape)}; a LoRA has a rank of at least 1")
    if tensor.itemsize == 1:
        tensor = tensor.bfloat16()  # fp8: every value of either kind is a bf16 number
    if not torch.isfinite(tensor).all():
        raise NunchakuError(f"{key}: holds NaN or infinite values")
    return tensor if scale is None else tensor.float() * number(state, scale)


def number(state: State, key: str) -> float:
    """One number that is not negative: alpha, or the scale of an fp8 tensor."""
    tensor = state[key]
    if tensor.numel() != 1:
        raise NunchakuError(f"{key}: expected one number, got shape {tuple(tensor.shape)}")
    value = float(tensor.flatten()[0])
    if not math.isfinite(value) or value < 0:
        raise NunchakuError(f"{key}: expected a finite number that is not negative, got {value}")
    return value


def same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first.float(), second.float())
