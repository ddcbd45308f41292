"""What quantizing by a kernel must give: the reference's bits, and a sum in fp32."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nunchaku_py.ops import OPS, ActSpec, backend
from tests.backends import cpu_bounds as bounds
from tests.backends.cpu_cases import Case

ACTS = ("int4", "uint4", "nvfp4", "int8", "none")
_INSTEAD = {torch.float32: torch.bfloat16, 48: 16, 0: 32}  # of what the kernels do not take


def run(device: str, op: str, *args: Tensor | ActSpec) -> tuple[Tensor, ...]:
    """op(*args) there by Triton, and the results here."""
    with backend("triton"):
        found = OPS[op](*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
    return tuple(tensor.cpu() for tensor in found)


def taken(case: Case) -> Case:
    """The case in numbers and groups that the kernels take."""
    return replace(case, dtype=_INSTEAD.get(case.dtype, case.dtype), group=_INSTEAD.get(case.group, case.group))


def product(x: Tensor, down: Tensor) -> bounds.Bounded:
    """x·downᵀ: tensor cores cut off where fp32 rounds, of sixteen products at a time."""
    a, b = x.double(), down.double()
    size = a.abs() @ b.abs().T
    return bounds.Bounded(a @ b.T, (x.shape[1] + 16) * bounds.U * bounds.MORE * size + x.shape[1] * 2.0**-149, size)


def assert_quantized(got: tuple[Tensor, ...], x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> None:
    for mine, reference in zip(got[:2], OPS["quantize_act"].reference(x, inv_smooth, down, spec), strict=False):
        bounds.assert_same(mine, reference)
    assert got[2].dtype == torch.float32
    bounds.assert_rounded_once(got[2], product(x, down))
