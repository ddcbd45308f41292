"""What a file in another format rounds, and the notes of it."""
from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format
from ..tensor import QTensor
from .notes import Notes


def rounded_again(weight: QTensor, wanted: Format, dtype: torch.dtype, notes: Notes) -> QTensor:
    """The weight of a W4A16 linear, in another format."""
    exact = weight.dequantize()
    new = QTensor.quantize(exact, wanted, dtype)
    error = ((new.dequantize() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    notes.add(f"weights of W4A16 linears in {weight.format.name}, rounded again to {wanted.name} (relative)", error)
    return new


def note_bias(bias: Tensor, found: Tensor, notes: Notes, of: str = "linears, rounded to 16 bit") -> None:
    """found: as which a bias will be read."""
    change = (found.float() - bias.float()).abs().max().item()
    if change:
        notes.add(f"biases of {of}", change)


def note_scales(scale: Tensor, found: Tensor, notes: Notes) -> None:
    """found: as which channel scales will be read."""
    change = ((found - scale).abs() / scale.abs().clamp_min(1e-30)).max().item()
    if change:
        notes.add("channel scales, rounded to 16 bit (relative)", change)
