"""What tests of whole models share: running them, comparing bits and pictures, how much error 4 bits explain."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nunchaku_py.methods.work import Options
from nunchaku_py.recipes import RECIPES

# All steps of the real recipe and all tensors of the real format, at a fraction of the time.
QUICK = replace(RECIPES["svdquant-int4"], name="quick-int4", rank=8, options=Options(rounds=1))
QUICK_NVFP4 = replace(RECIPES["svdquant-nvfp4"], name="quick-nvfp4", rank=8, options=Options(rounds=1))
E2M1_STEPS = ((2.0, 0.5), (4.0, 1.0), (torch.inf, 2.0))  # (below this, the distance between neighbours)


def first(out: Any) -> Tensor:
    """The tensor in whatever a model or pipeline returns."""
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return first(model(**inputs)).clone()


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Forward arguments of a bf16 model for one of another dtype."""
    return {key: value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
            for key, value in inputs.items()}


def relative(y: Tensor, reference: Tensor) -> float:
    y, reference = y.double(), reference.double()
    return ((y - reference).norm() / reference.norm()).item()


def bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one of two states has, or whose bits differ."""
    return sorted(set(a) ^ set(b)) + [name for name in a if name in b and not same_bits(a[name], b[name])]


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of quantized linears alone."""
    from nunchaku_py.swap import quantized_modules

    return {f"{name}.{key}": tensor.clone() for name, module in quantized_modules(model).items()
            for key, tensor in module.state_dict().items()}


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -------------------------------------------------------------------------------------- how much error to expect
def rounding_error(x: Tensor, fmt: str, group: int) -> float:
    """Relative rms error of rounding the last axis in groups, from the format alone: a step of d errs by d/√12.

    int4: d = absmax/7. nvfp4: d depends on where a value lies in the e2m1 grid, of which absmax/6 is the unit.
    """
    x = x.detach().float()
    parts = x.reshape(-1, x.shape[-1]).split(group, dim=-1)
    wrong = sum((_steps(part, fmt).square().sum() / 12).item() for part in parts)
    return (wrong / x.square().sum().item()) ** 0.5


def _steps(part: Tensor, fmt: str) -> Tensor:
    top = part.abs().amax(-1, keepdim=True)
    if fmt == "int4":
        return (top / 7).expand_as(part)
    unit = (top / 6).clamp_min(torch.finfo(torch.float32).tiny)
    steps = torch.zeros_like(part)
    for limit, step in reversed(E2M1_STEPS):
        steps = torch.where(part.abs() / unit <= limit, step * unit, steps)
    return steps


@contextmanager
def noisy(model: nn.Module, rows: Any, quantized_inputs: bool) -> Iterator[None]:
    """The 16-bit model with white noise on the output of every linear that `rows` (of a report) say is quantized.

    The noise is as large as rounding the weight, and if asked the input, to the row's format would make it. How a
    model's output answers to it tells what error to expect of quantization, whatever the architecture amplifies.
    """
    with ExitStack() as stack:
        for name, row in {row.name: row for row in rows}.items():
            hook = _Noise(row.format, 64 if row.format == "int4" else 16, quantized_inputs and row.kind == "w4a4")
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


class _Noise:
    def __init__(self, fmt: str, group: int, inputs: bool) -> None:
        self.fmt, self.group, self.inputs = fmt, group, inputs
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        error = rounding_error(module.weight.flatten(1), self.fmt, self.group) ** 2
        if self.inputs:
            x = args[0].movedim(1, -1) if isinstance(module, nn.Conv2d) else args[0]
            error += rounding_error(x, self.fmt, self.group) ** 2
        size = (error * y.float().square().mean().item()) ** 0.5
        return y + (size * torch.randn(y.shape, generator=self.generator)).to(y.dtype)
