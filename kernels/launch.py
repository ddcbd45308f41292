"""How every kernel starts: its arguments by position, then its constants by name."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# x·r + s stays two roundings: some kernels must give the same bits as the formula of their op, and Triton's default for
# all others is about to change (3.10), with the last bits of what they give.
EXACT = {"enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """kernel[grid](…) on the device of its first tensor and the stream that is current there; nothing where the grid is
    empty."""
    if not all(grid):
        return
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):  # Triton looks at no tensor's
        kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)
