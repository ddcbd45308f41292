"""What Triton kernels need of a machine, and why they do not have it."""
from __future__ import annotations

import importlib
import importlib.metadata
import re
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ...ops.checks import short

DEVICE = "cuda"
OLDEST = (8, 0)
OLDEST_FP8 = (8, 9)
OLDEST_TRITON = (3, 6)
TYPES = (torch.bfloat16, torch.float16)
NVFP4 = ((12, 0), (12, 1))  # where Triton multiplies NVFP4 by an instruction


def refuses_device(tensor: Tensor) -> str | None:
    return refuses_place(tensor.device)


def refuses_place(device: torch.device) -> str | None:
    if device.type != DEVICE:
        return f"the tensors are on {device.type}"
    return refuses_triton() or refuses_capability(capability_of(device))


@cache
def refuses_triton() -> str | None:
    """Asked of the installed files, which is fast: Triton itself is imported when a kernel runs."""
    if torch.version.hip:
        return "its kernels are made for NVIDIA GPUs"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the package triton is not installed"
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    wanted = "{}.{}".format(*OLDEST_TRITON)
    return f"its kernels need triton {wanted}, this is {version}" if found < OLDEST_TRITON else None


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def refuses_capability(capability: tuple[int, int]) -> str | None:
    if capability >= OLDEST:
        return None
    return "its kernels need compute capability {}.{}, this GPU has {}.{}".format(*OLDEST, *capability)


def refuses_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in TYPES else f"it computes in bfloat16 or float16, not {short(dtype)}"


def refuses_gradient(tensor: Tensor) -> str | None:
    return "it gives no gradient" if tensor.requires_grad and torch.is_grad_enabled() else None


def kernels(name: str) -> ModuleType:
    """A module of kernels/, which imports Triton."""
    return importlib.import_module(f"nunchaku_py.kernels.{name}")
