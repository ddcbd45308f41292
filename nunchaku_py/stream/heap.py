"""Giving memory back to the system. C libraries keep what is freed for later; between blocks of hundreds of tensors a
few small ones stay, and what lies around them would never be of use again: 150 MB for each block of FLUX.1."""
from __future__ import annotations

import ctypes
import gc
import sys

import torch


def give_back() -> None:
    """What nobody uses any more, of this process and of a GPU."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's alone
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
