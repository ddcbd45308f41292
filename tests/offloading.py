"""What tests of offloading share."""
from __future__ import annotations

import pytest
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.offload.budget import parse_size


def least(model: nn.Module, device: str = "cpu") -> int:
    """The smallest budget that works, by what the refusal says."""
    with pytest.raises(NunchakuError, match="the least that works is") as refusal:
        nq.offload(model, vram=0, device=device)
    return parse_size(str(refusal.value).split("vram='")[1].rstrip("'"), "vram")


def streamed(model: nn.Module, more: int = 0) -> nn.Module:
    """On the CPU, in the least memory that works and so much more."""
    nq.offload(model, vram=least(model) + more, device="cpu")
    return model
