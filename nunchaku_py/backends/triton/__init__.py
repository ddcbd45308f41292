"""The ops by Triton kernels (kernels/), on NVIDIA GPUs from compute capability 8.0 on: everything in rows, nothing
compiled before it is asked for.
"""
from . import attention  # noqa: F401  (it registers itself with the ops)
