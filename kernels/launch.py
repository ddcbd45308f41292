"""How every kernel starts: its arguments by position, then its constants by name."""
from __future__ import annotations

from typing import Any

# x·r + s stays two roundings where a kernel must give the same bits as the formula of its op.
EXACT = {"enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """kernel[grid](…) on the stream and device of its tensors; nothing where the grid is empty."""
    if all(grid):
        kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)
