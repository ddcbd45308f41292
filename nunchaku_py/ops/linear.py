"""What the fifteen linear ops share: three ways to accumulate times five epilogues (epilogue.py), composed here.

    y = acc + h·upᵀ + bias      in fp32; what an epilogue makes of y is rounded once, to the dtype of up

qx, sx, h: as quantize_act gives them. Weights in row layout:
    int4, uint4, nvfp4   qw uint8 (N,ceil(K/2)), sw (N,G)
    int8                 qw int8 (N,K), sw (N) fp32
aux: channel_scale (N) fp32 for nvfp4, zeros (N,G) for uint4, empty (0) for the others; with spec.row_scales (int4 and
nvfp4) fold_int8's s_ch (N) fp32 in front of it. up (N,R), bias (N). R may be 0.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..formats import decode, group_count, row_chunks
from .checks import FLOATS, Expected, expect, expect_matrix, expect_that
from .epilogue import EPILOGUES, Epilogue
from .quantize_act import unpack
from .registry import Op
from .spec import ROW, LinearSpec

LINEAR = ("qx", "sx", "qw", "sw", "aux", "h", "up", "bias")
LONGEST_INT8 = (2**31 - 1) // 127**2
DECODED = 2**24  # weights decoded at a time
Accumulate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LinearSpec], Tensor]


def family(accumulate: Accumulate, acts: tuple[str, ...], weights: tuple[str, ...]) -> tuple[Op, ...]:
    """The ops of one way to accumulate, one for each epilogue; they are named after its module."""
    return tuple(_compose(accumulate, epilogue, acts, weights) for epilogue in EPILOGUES)


def _compose(accumulate: Accumulate, epilogue: Epilogue, acts: tuple[str, ...], weights: tuple[str, ...]) -> Op:
    name = accumulate.__module__.rpartition(".")[2] + epilogue.suffix

    def reference(*args):
        (qx, sx, qw, sw, aux, h, up, bias), extra, spec = args[:8], args[8:-1], args[-1]
        y = accumulate(qx, sx, qw, sw, aux, spec)
        return epilogue.apply(y.add_(h @ up.float().T).add_(bias.float()), up.dtype, *extra, spec)

    def fake(*args):
        qx, qw, up, extra = args[0], args[2], args[6], args[8:]
        return epilogue.fake(up, qx.shape[0], qw.shape[0], *extra)

    def check(*args):
        (qx, _, qw, *_), extra, spec = args[:8], args[8:-1], args[-1]
        act, weight = spec.act.format, spec.weight
        expect_that(act in acts, f"{name}: spec.act.format is {act!r}, expected {' or '.join(acts)}")
        expect_that(weight in weights, f"{name}: spec.weight is {weight!r}, expected {' or '.join(weights)}")
        expect_that(act != "int8" or spec.k <= LONGEST_INT8,
                    f"{name}: expected at most {LONGEST_INT8} inputs, whose INT8 products 32 bits hold, got {spec.k}")
        expect_that(not spec.row_scales or (act == "int8" and weight in ("int4", "nvfp4")),
                    f"{name}: spec.row_scales goes with int4 or nvfp4 weights and int8 activations")
        expect_matrix("qx", "of rows", qx)
        expect_matrix("qw", "of output channels", qw)
        if _row_layout(spec):
            expect(qx, (*_operands(*args[:8], spec), *epilogue.check(args[6], qx.shape[0], qw.shape[0], *extra, spec)))

    reference.__name__ = reference.__qualname__ = name
    reference.__doc__ = f"{accumulate.__doc__}\n    Then {epilogue.doc}"
    reference.__signature__ = _signature(epilogue)
    return Op(reference, fake, check)


def _row_layout(spec: LinearSpec) -> bool:
    """Packed tensors have the shapes their backend gave them; only that backend can check them."""
    return all(layout == ROW for layout in spec.layouts)


def _signature(epilogue: Epilogue) -> inspect.Signature:
    def parameter(name: str, kind: str) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)

    tensors = [parameter(name, "Tensor") for name in LINEAR + epilogue.parameters]
    returns = "Tensor" if epilogue.outputs == 1 else f"tuple[{', '.join(['Tensor'] * epilogue.outputs)}]"
    return inspect.Signature([*tensors, parameter("spec", "LinearSpec")], return_annotation=returns)


def _operands(
    qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, aux: Tensor, h: Tensor, up: Tensor, bias: Tensor, spec: LinearSpec
) -> Iterable[Expected]:
    m, n, rank = qx.shape[0], qw.shape[0], up.shape[-1]
    yield "up", up, "(out, rank)", (n, rank), FLOATS
    yield "h", h, "(rows, rank)", (m, rank), (torch.float32,)
    yield "bias", bias, "(out)", (n,), FLOATS
    yield from _activation(qx, sx, m, up.dtype, spec)
    yield from _weight(qw, sw, aux, n, spec)


def _activation(qx: Tensor, sx: Tensor, m: int, dtype: torch.dtype, spec: LinearSpec) -> Iterable[Expected]:
    act = spec.act.fmt
    if act is None:
        yield "qx", qx, "(rows, in)", (m, spec.k), (dtype,)
        yield "sx", sx, "(none)", (0,), None
    elif not act.packed:
        yield "qx", qx, "(rows, in)", (m, spec.k), (torch.int8,)
        yield "sx", sx, "(rows)", (m,), (torch.float32,)
    else:
        yield "qx", qx, "(rows, ceil(in/2))", (m, -(-spec.k // 2)), (torch.uint8,)
        yield "sx", sx, "(rows, groups)", (m, group_count(spec.k, act.group)), _scale_dtypes(act.name)


def _weight(qw: Tensor, sw: Tensor, aux: Tensor, n: int, spec: LinearSpec) -> Iterable[Expected]:
    fmt, groups = spec.fmt, group_count(spec.k, spec.group)
    if not fmt.packed:
        yield "qw", qw, "(out, in)", (n, spec.k), (torch.int8,)
        yield "sw", sw, "(out)", (n,), (torch.float32,)
    else:
        yield "qw", qw, "(out, ceil(in/2))", (n, -(-spec.k // 2)), (torch.uint8,)
        yield "sw", sw, "(out, groups)", (n, groups), _scale_dtypes(fmt.name)
    if spec.row_scales:
        parts = 2 if fmt.name == "nvfp4" else 1
        yield "aux", aux, "row scales, channel_scale (out or 2·out)", (parts * n,), (torch.float32,)
    elif fmt.name == "nvfp4":
        yield "aux", aux, "channel_scale (out)", (n,), (torch.float32,)
    elif fmt.name == "uint4":
        yield "aux", aux, "zeros (out, groups)", (n, groups), FLOATS
    else:
        yield "aux", aux, "(none)", (0,), None


def _scale_dtypes(name: str) -> tuple[torch.dtype, ...]:
    return (torch.float8_e4m3fn,) if name == "nvfp4" else FLOATS


def decode_weight(qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec) -> Tensor:
    """fp32 (rows,K) of a weight in row layout."""
    codes, scales = unpack(qw, sw, spec.k, spec.fmt)
    return decode(codes, scales, spec.fmt, *zeros_and_channel_scale(aux, spec))


def zeros_and_channel_scale(aux: Tensor, spec: LinearSpec) -> tuple[Tensor | None, Tensor | None]:
    return aux if spec.weight == "uint4" else None, aux if spec.weight == "nvfp4" else None


def multiply_decoded(x: Tensor, qw: Tensor, sw: Tensor, aux: Tensor, spec: LinearSpec, operand: torch.dtype) -> Tensor:
    """x (M,K) fp32 · wᵀ in fp32, the decoded weight rounded to `operand`, a stretch of rows of w at a time."""
    y = x.new_empty(x.shape[0], qw.shape[0])
    for rows in row_chunks(qw.shape[0], spec.k, DECODED):
        w = decode_weight(qw[rows], sw[rows], aux[rows], spec)
        y[:, rows] = x @ w.to(operand).float().T
    return y
