"""Biases, which Nunchaku's files hold in 16 bit, those of modulations with 1 added to the scales.

What is lost by that, a file of ours says in its metadata, in which other readers do not look: so the model that is read
back is the one that was written."""
from __future__ import annotations

import base64
import binascii

import torch
from torch import Tensor

from ...errors import NunchakuError
from ...module_tools import dtype_name

_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def _scales_of_modulation(n: int, spread: int) -> list[slice]:
    """Which rows, in diffusers' order, are the scales that 1 is added to: the second of (shift, scale, gate)."""
    each = n // max(spread, 1)
    return [slice(place * each, (place + 1) * each) for place in range(1, spread, 3)]


def stored(bias: Tensor, spread: int, dtype: torch.dtype) -> Tensor:
    """As a file holds it, in diffusers' order. spread: 0, or how many outputs a modulation has for each channel."""
    wanted = bias.float().clone()
    for rows in _scales_of_modulation(bias.shape[0], spread):
        wanted[rows] += 1
    return wanted.to(dtype)


def read(found: Tensor, spread: int) -> Tensor:
    """The inverse, but for what was rounded. fp32 for a modulation: h(b+1) − 1 is exact there, so that adding 1 and
    rounding gives h(b+1) again."""
    if not spread:
        return found
    bias = found.float()
    for rows in _scales_of_modulation(bias.shape[0], spread):
        bias[rows] -= 1
    return bias


def encoded(bias: Tensor) -> str:
    raw = bias.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{dtype_name(bias.dtype)}:{base64.b64encode(raw).decode()}"


def decoded(text: object, label: str) -> Tensor:
    try:
        kind, _, raw = str(text).partition(":")
        return torch.frombuffer(bytearray(base64.b64decode(raw, validate=True)), dtype=_DTYPES[kind])
    except (KeyError, ValueError, binascii.Error) as error:
        raise NunchakuError(f"{label}: the bias in the metadata cannot be understood") from error


def same(a: Tensor, b: Tensor) -> bool:
    """In every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
