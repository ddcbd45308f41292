"""The ops on NVIDIA GPUs, by the native module (csrc/cuda): INT4 weights and activations in groups of 64, and INT8.

Codes lie as the file holds them. Scales of groups lie in the layout "mma" (ops/spec.py), in the order in which threads
read them: those of weights are put there by `packed_scales`, once; those of activations by the kernels.
"""
from . import linear_w4a16, linears, quantizing  # noqa: F401  (they register themselves with the ops)
from .device import asked_for, refuses_gpu, runs_on
from .numbers import expands, packed_scales, why_not_packed

__all__ = ["asked_for", "expands", "packed_scales", "refuses_gpu", "runs_on", "why_not_packed"]
