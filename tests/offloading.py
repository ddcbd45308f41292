"""What tests of offloading share."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.sizes import parse_size


def refused(model: nn.Module, name: str, **more: str) -> int:
    """The smallest budget that works, by what the refusal of a smaller one says."""
    with pytest.raises(NunchakuError, match="the least that works is") as refusal:
        nq.offload(model, **{name: 0}, **more)
    return parse_size(str(refusal.value).split(f"{name}='")[1].rstrip("'"), name)


def least(model: nn.Module, device: str = "cpu") -> int:
    return refused(model, "vram", device=device)


def streamed(model: nn.Module, more: int = 0) -> nn.Module:
    """On the CPU, in the least memory that works and so much more."""
    nq.offload(model, vram=least(model) + more, device="cpu")
    return model


def picture(pipe: Any, call: dict) -> Any:
    return pipe(**{**call, "generator": torch.Generator().manual_seed(0)}).images
