"""The GPU that a tensor is on, as configurations are chosen for it."""
from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nunchaku_py.backends.triton import device as backend

from .config import Gpu

SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB a block may have; others: 99


def gpu_of(tensor: Tensor) -> Gpu:
    return _gpu_of(tensor.device, backend.capability_of(tensor.device))


@cache
def _gpu_of(device: torch.device, capability: tuple[int, int]) -> Gpu:
    name, processors = "none", 132
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, processors = found.name, found.multi_processor_count
    return Gpu(name, capability, processors, SHARED.get(capability, 99) * 1024)
