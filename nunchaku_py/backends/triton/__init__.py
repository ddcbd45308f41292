"""The ops by Triton kernels (kernels/), on NVIDIA GPUs from compute capability 8.0 on: everything in rows, nothing
compiled before it is asked for.
"""
from . import attention, linears, quantizing  # noqa: F401  (they register themselves with the ops)
from .linears import expands

__all__ = ["expands"]
