"""linear_w4a4 and linear_w4a8 with their endings, by the CUDA kernels: several calls to a launch."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from torch import Tensor

from ... import native, ops
from ...ops.checks import short
from ...ops.registry import Op
from ...ops.spec import MMA, ROW, LinearSpec
from . import endings
from .device import TYPES, refuses_device, refuses_dtype
from .endings import Ending
from .numbers import refuses_act, refuses_weight
from .operands import Linear

WIDEST_HEAD = 128  # a head lies in one tile
TOGETHER = 6  # linears of a launch: PARTS of group.cuh
Refusal = Callable[..., "str | None"]


# ------------------------------------------------------------------------------------------------------ what is refused
def other_scales(sw: Tensor, up: Tensor) -> str:
    return f"the weight's scales are {short(sw.dtype)}, and it computes in {short(up.dtype)}"


def _refuses(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, *args: Tensor | LinearSpec) -> str | None:
    spec, up = args[-1], args[2]
    refused = refuses_device(qx) or refuses_dtype(up.dtype, qx.device) or refuses_weight(spec, qw.shape[0], qx.device)
    if refused or spec.weight != "int4":
        return refused
    fits = sw.dtype in TYPES if spec.row_scales else sw.dtype == up.dtype
    return None if fits else other_scales(sw, up)


def _refuses_signed(*args: Tensor | LinearSpec) -> str | None:
    if args[-1].act.format == "uint4":
        return "this ending takes no unsigned codes, which follow a GELU"
    return _refuses(*args)


def _refuses_next(parts: int) -> Refusal:
    """Of an ending that makes one column of the next input from so many of its own."""
    def refuses(*args: Tensor | LinearSpec) -> str | None:
        spec, mine = args[-1].next, args[-1].act.format
        refused = _refuses_signed(*args) or refuses_act(spec, args[2].shape[0] // parts, args[0].device)
        alike = {"int4": ("int4", "uint4")}.get(mine, (mine,))
        return refused or (None if spec.format in alike else f"it goes from {mine} to {spec.format}")

    return refuses


def _refuses_heads(*args: Tensor | LinearSpec) -> str | None:
    dim = args[-1].head_dim
    if dim & (dim - 1) or not 8 <= dim <= WIDEST_HEAD:
        return f"it takes heads of 8, 16 … {WIDEST_HEAD}, not {dim}"
    return _refuses_signed(*args)


# ------------------------------------------------------------------------------------------------------------- launches
def _launches(calls: Sequence[tuple]) -> list[list[int]]:
    """Which calls go in a launch: those of one type and kind of codes, so many at most."""
    alike: dict[tuple, list[int]] = {}
    for i, args in enumerate(calls):
        spec = args[-1]
        key = args[6].dtype, spec.act.format, spec.next and spec.next.format == "int8", args[0].device
        alike.setdefault(key, []).append(i)
    return [mine[i:i + TOGETHER] for mine in alike.values() for i in range(0, len(mine), TOGETHER)]


def _launch(name: str, calls: list[tuple], ending: Ending) -> list[object]:
    linears = [Linear(args) for args in calls]
    ended = ending(linears)
    if any(linear.m and linear.n for linear in linears):
        getattr(native.module.cuda, name)(
            [(linear.arguments(), to) for linear, (to, _) in zip(linears, ended, strict=True)])
    return [result() for _, result in ended]


def _register(op: Op, ending: Ending, refuses: Refusal, layout: str) -> None:
    def together(calls: Sequence[tuple]) -> list[object]:
        results: dict[int, object] = {}
        for mine in _launches(calls):
            results |= zip(mine, _launch(op.name, [calls[i] for i in mine], ending), strict=True)
        return [results[i] for i in range(len(calls))]

    def run(*args: Tensor | LinearSpec) -> object:
        return _launch(op.name, [args], ending)[0]

    run.__signature__ = inspect.signature(op.reference)
    op.backend("cuda", refuses, (layout,), together)(run)


_ENDINGS: dict[str, tuple[Ending, Refusal]] = {
    "": (endings.stored, _refuses),
    "_gate_residual": (endings.gated, _refuses),
    "_qkv_rope": (endings.rotated, _refuses_heads),
    "_gelu_quantize": (endings.quantized("_gelu_quantize", 1), _refuses_next(1)),
    "_glu_quantize": (endings.quantized("_glu_quantize", 2), _refuses_next(2)),
}
for _family, _layout in ((ops.linear_w4a4, MMA), (ops.linear_w4a8, ROW)):
    for _suffix, (_ending, _why_not) in _ENDINGS.items():
        _register(ops.OPS[_family.name + _suffix], _ending, _why_not, _layout)
