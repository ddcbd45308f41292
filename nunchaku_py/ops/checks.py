"""What every backend may rely on: wrong shapes, dtypes and devices are refused here, before a backend is chosen."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import NunchakuError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# name, tensor, meaning of the shape, shape, dtypes (None: any)
Expected = tuple[str, Tensor, str, tuple[int, ...], "tuple[torch.dtype, ...] | None"]


def expect(first: Tensor, tensors: Iterable[Expected]) -> None:
    """Refuse the first tensor that is not as expected, or not on the device of `first`."""
    device = first.device
    for name, tensor, meaning, shape, dtypes in tensors:
        if tensor.shape != shape or (dtypes and tensor.dtype not in dtypes):
            wanted = f" {' or '.join(short(d) for d in dtypes)}" if dtypes else ""
            got = f"{tuple(tensor.shape)} {short(tensor.dtype)}"
            raise NunchakuError(f"{name}: expected {meaning} = {tuple(shape)}{wanted}, got {got}")
        if tensor.device != device:
            raise NunchakuError(f"{name}: expected it on {device} as the other arguments, got {tensor.device}")


def expect_matrix(name: str, meaning: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise NunchakuError(f"{name}: expected a matrix {meaning}, got {tuple(tensor.shape)}")


def expect_that(holds: bool, sentence: str) -> None:
    if not holds:
        raise NunchakuError(sentence)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
