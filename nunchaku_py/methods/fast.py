"""The inner loops of the steps by native code (CPU) or Triton (GPU); the torch code of the steps is their reference.

`NUNCHAKU_PY_BACKEND=torch` (or `ops.backend("torch")`) leaves them out, as it does with the ops.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends.cpu import FORMATS, SPAN, TYPES
from ..backends.triton import device as gpu
from ..formats import Format
from ..ops.registry import forced_backend

TRITON_COLUMNS = 128  # COLUMNS of kernels/gptq.py, which imports Triton


def sweep_columns(like: Tensor) -> int:
    """How many columns `sweep` rounds at once on this tensor's device; 0: there is no such kernel."""
    if _native(like):
        return native.module.sweep_columns
    triton = forced_backend() in (None, "triton") and like.is_floating_point() and gpu.refuses_device(like) is None
    return TRITON_COLUMNS if triton else 0


def sweep(columns: Tensor, errors: Tensor, upper: Tensor, step: Tensor, inverse: Tensor, group: Tensor, fmt: Format
          ) -> None:
    """GPTQ's column loop over columns (k,N), in place; errors (k,N) receives e. step, inverse (G,N); group int64 (k).

    Rows of columns and errors lie apart as they like, but are whole."""
    upper, group = upper.contiguous(), group.contiguous()  # a Cholesky factor lies in columns
    if not _native(columns):
        return gpu.kernels("gptq").sweep(columns, errors, upper, step, inverse, group, fmt)
    k, n = columns.shape
    native.module.sweep(n, k, columns.data_ptr(), columns.stride(0), errors.data_ptr(), errors.stride(0),
                        upper.data_ptr(), upper.stride(0), step.data_ptr(), inverse.data_ptr(), group.data_ptr(),
                        FORMATS[fmt.name], torch.get_num_threads())


def rounds_rows(remainder: Tensor, weight: Tensor, fmt: Format) -> bool:
    """Whether `round_rows` takes these."""
    known = fmt.name in ("int4", "nvfp4") and fmt.group > 0 and fmt.group % SPAN == 0
    return _native(remainder) and known and weight.dtype in TYPES


def round_rows(remainder: Tensor, weight: Tensor, smooth: Tensor, signal: Tensor, rounding: Tensor, fmt: Format,
               scale_dtype: torch.dtype) -> Tensor:
    """R (n,K) becomes Ŵ − RTN(R) in place; the rows' shares of J, fp64 (n)."""
    weight = weight.contiguous()
    cost = torch.empty(len(remainder), dtype=torch.float64, device=remainder.device)
    signal, rounding, smooth = (t.float().contiguous() for t in (signal, rounding, smooth))
    native.module.round_rows(*remainder.shape, remainder.data_ptr(), (weight.data_ptr(), TYPES[weight.dtype]),
                             smooth.data_ptr(), signal.data_ptr(), rounding.data_ptr(), FORMATS[fmt.name], fmt.group,
                             TYPES[scale_dtype], cost.data_ptr(), torch.get_num_threads())
    return cost


def _native(like: Tensor) -> bool:
    return like.device.type == "cpu" and native.module is not None and forced_backend() in (None, "cpu")
