"""The operands of a linear op, as the CUDA kernels read them."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import native
from ...ops.checks import Expected, expect, expect_matrix
from ...ops.epilogue import EPILOGUES
from ...ops.spec import MMA, LinearSpec, mma_scales
from .device import TYPES, aligned, where
from .numbers import CODES

RANKS = 16  # the kernels multiply by so many ranks of up at a time
_EPILOGUES = {epilogue.suffix: epilogue for epilogue in EPILOGUES}


def whole_ranks(h: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    missing = -up.shape[1] % RANKS
    return (F.pad(h, (0, missing)), F.pad(up, (0, missing))) if missing else (h, up)


class Linear:
    """A call's operands and what else its ending takes: alive until the kernel is on its stream."""

    def __init__(self, args: tuple) -> None:
        (qx, sx, qw, sw, aux, h, up, bias), self.extra, self.spec = args[:8], args[8:-1], args[-1]
        if self.spec.layout == MMA:
            expect(qx, _packed(*args[:8], self.spec))
        h, up = whole_ranks(h, up)
        if self.spec.row_scales:
            qw, sw = expanded(qw, sw, aux, self.spec)
        self.qx, self.sx, self.qw, self.sw, self.h, self.up = map(aligned, (qx, sx, qw, sw, h, up))
        self.aux, self.bias = aligned(aux), aligned(bias, torch.float32)
        self.m, self.n = qx.shape[0], qw.shape[0]

    def arguments(self):
        channel_scales = self.aux.data_ptr() if self.spec.weight == "nvfp4" else 0
        return native.module.cuda.LinearArguments(
            *where(self.qx), TYPES[self.up.dtype], self.m, self.n, self.spec.k, self.up.shape[1], self.qx.data_ptr(),
            self.sx.data_ptr(), CODES[self.spec.act.format], self.qw.data_ptr(), self.sw.data_ptr(), channel_scales,
            self.h.data_ptr(), self.up.data_ptr(), self.bias.data_ptr())

    def expect_more(self, suffix: str) -> None:
        expect(self.qx, _EPILOGUES[suffix].check(self.up, self.m, self.n, *self.extra, self.spec))

    def keep(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.extra = tensors
        return tensors


def expanded(qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """(w8, s_ch) of a 4-bit weight whose s_ch stands in aux."""
    qw, sw, aux, n = aligned(qw), aligned(sw), aligned(aux), qw.shape[0]
    w8 = qw.new_empty((n, spec.k), dtype=torch.int8)
    channel_scales = aux[n:].data_ptr() if spec.weight == "nvfp4" else 0
    if w8.numel():
        native.module.cuda.expand_int8(native.module.cuda.ExpandArguments(
            *where(qw), TYPES.get(sw.dtype, 0), CODES[spec.weight], n, spec.k, spec.group, qw.data_ptr(), sw.data_ptr(),
            aux.data_ptr(), channel_scales, w8.data_ptr()))
    return w8, aux[:n]


def _packed(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, aux: Tensor, h: Tensor, up: Tensor, bias: Tensor,
            spec: LinearSpec) -> tuple[Expected, ...]:
    """What the layout "mma" has; ops check the others themselves."""
    for name, tensor in (("qx", qx), ("qw", qw), ("h", h), ("up", up)):
        expect_matrix(name, "of rows", tensor)
    m, n, codes = qx.shape[0], qw.shape[0], (torch.uint8,)
    scales, words = {"nvfp4": (torch.float8_e4m3fn, ", 4)")}.get(spec.weight, (up.dtype, ")"))
    channels, of_channels = (n, (torch.float32,)) if spec.weight == "nvfp4" else (0, None)
    return (
        ("qx", qx, "(rows, in/2)", (m, spec.k // 2), codes),
        ("sx", sx, "(in/64, padded rows" + words, mma_scales(spec.weight, m, spec.k), (scales,)),
        ("qw", qw, "(out, in/2)", (n, spec.k // 2), codes),
        ("sw", sw, "(in/64, padded out" + words, mma_scales(spec.weight, n, spec.k), (scales,)),
        ("aux", aux, "channel_scale (out)" if of_channels else "(none)", (channels,), of_channels),
        ("h", h, "(rows, rank)", (m, up.shape[1]), (torch.float32,)),
        ("up", up, "(out, rank)", (n, up.shape[1]), None),
        ("bias", bias, "(out)", (n,), None),
    )
