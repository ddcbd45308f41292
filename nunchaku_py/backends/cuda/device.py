"""What CUDA kernels need of a GPU, and why one does not have it."""
from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ... import native
from ...ops.checks import short
from ...ops.registry import forced_backend

DEVICE = "cuda"
OLDEST, OLDEST_BF16 = 75, 80  # compute capabilities; 7.5 multiplies float16 only
TYPES = {torch.bfloat16: 1, torch.float16: 2}
HOPPER = (9, 0)
NVFP4 = ((12, 0), (12, 1))  # what multiplies NVFP4 by an instruction that these kernels know


def asked_for(device: torch.device) -> bool:
    """Whether the kernels would be asked first on this device."""
    if device.type != DEVICE:
        return False
    return torch.compiler.is_compiling() or forced_backend() in (None, "cuda")  # a compiler cannot look


# ------------------------------------------------------------------------------------------------------ what is refused
def refuses_device(tensor: Tensor) -> str | None:
    if tensor.device.type != DEVICE:
        return f"the tensors are on {tensor.device.type}"
    return refuses_gpu(capability_of(tensor.device))


def refuses_gpu(capability: tuple[int, int]) -> str | None:
    """Why none of the kernels runs on such a GPU of this machine."""
    if not hasattr(native.module, "cuda"):
        return native.status()
    return refuses_driver() or refuses_capability(capability)


@cache
def refuses_driver() -> str | None:
    return native.why_not_this_driver() or None


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def refuses_capability(capability: tuple[int, int]) -> str | None:
    major, minor = capability
    if major * 10 + minor < OLDEST:
        return f"its kernels need compute capability {OLDEST / 10}, this GPU has {major}.{minor}"
    if not any(runs_on(target, capability) for target in native.cuda_targets()):
        return f"it was not built for compute capability {major}.{minor}, but for {', '.join(native.cuda_targets())}"
    return None


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for a target ("86", "90a") runs on a GPU: of its own generation, no newer, and exactly it
    where the target is architecture-specific."""
    number = int(target.rstrip("af"))
    major, minor = divmod(number, 10)
    return (major, minor) == capability if target[-1] == "a" else major == capability[0] and minor <= capability[1]


def refuses_dtype(dtype: torch.dtype, device: torch.device, oldest_bf16: int = OLDEST_BF16) -> str | None:
    if dtype not in TYPES:
        return f"it computes in bfloat16 or float16, not {short(dtype)}"
    major, minor = capability_of(device)
    if dtype == torch.bfloat16 and major * 10 + minor < oldest_bf16:
        return (f"a GPU of compute capability {major}.{minor} multiplies no bfloat16: model.to(torch.float16) runs on "
                "its kernels")
    return None


def refuses_int8(device: torch.device) -> str | None:
    """Hopper's kernel is made of instructions that code for its whole generation cannot have."""
    if capability_of(device) != HOPPER or "90a" in native.cuda_targets():
        return None
    return f"its INT8 kernel for Hopper needs the target 90a, and it was built for {', '.join(native.cuda_targets())}"


def refuses_nvfp4(device: torch.device) -> str | None:
    major, minor = capability_of(device)
    if (major, minor) not in NVFP4:
        return f"a GPU of compute capability {major}.{minor} has no instruction for NVFP4 that these kernels use"
    targets = native.cuda_targets()
    if any(target[-1] in "af" and runs_on(target, (major, minor)) for target in targets):
        return None
    return (f"it has NVFP4 kernels where it was built for {major}{minor}a or {major}0f, and it was built for "
            f"{', '.join(targets)}")


# ----------------------------------------------------------------------------------------------------- calling a kernel
def where(tensor: Tensor) -> tuple[int, int]:
    """(device, stream)"""
    if tensor.device.type != "cuda":  # tests: kernels that run on the host
        return 0, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def aligned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As kernels read it: contiguous, from a multiple of 16 bytes on, of this dtype."""
    tensor = (tensor if dtype is None else tensor.to(dtype)).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
