"""Our arithmetic says itself what is rounded where; torch.autocast must not reach into it."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which products have the dtype of their operands."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype in which an nn.Linear would compute here."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
