"""What tests of fused patterns share: which ops ran, and a patterned module beside itself without patterns."""
from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import ops

RECIPES = ("rtn-int4", "rtn-nvfp4")
MODES = ("a4", "a8", "a16")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Names of the ops that run within it."""
    with pytest.MonkeyPatch.context() as patch:
        calls: Counter[str] = Counter()
        for name, op in ops.OPS.items():
            patch.setattr(op, "_run", lambda *args, n=name, run=op._run: (calls.update([n]), run(*args))[1])
        yield calls


def endings(calls: Counter[str]) -> dict[str, int]:
    """How often which ending ran, whatever the mode; norm_modulate_quantize too."""
    found: Counter[str] = Counter()
    for ending in ("norm_modulate_quantize", "gelu_quantize", "glu_quantize", "gate_residual"):
        found[ending] = sum(count for name, count in calls.items() if name.endswith(ending))
    return dict(+found)


def unfused(module: nn.Module) -> nn.Module:
    """A copy whose patterns are switched off."""
    apart = copy.deepcopy(module)
    nq.set_fusion(apart, False)
    return apart


def wide(module: nn.Module) -> nn.Module:
    """A copy that computes in fp32."""
    return nn.Module.to(copy.deepcopy(module), torch.float32)
