"""The ops on the CPU, by the native module (csrc/cpu). Tensors stay in row layout: the kernels read what the file
holds, and expand 4-bit weights a panel at a time in the cache.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import native, ops
from ..ops.epilogue import EPILOGUES
from ..ops.quantize_act import empty_like_quantized
from ..ops.registry import Op, forced_backend
from ..ops.spec import ActSpec, LinearSpec
from ..tensor import QTensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"none": 0, "int4": 1, "uint4": 2, "nvfp4": 3, "int8": 4}
NORMS = {"none": 0, "layer": 1, "rms": 2}
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}
STORE, ACTIVATE, GLU, GATE_RESIDUAL = range(4)
SPAN = 16  # weights that share a table in the kernels
FUSED_BYTES = 16 * 2**20  # of the activated value between two linears: it stays in the cache
Operand = tuple[int, int]
NOTHING: Operand = (0, 0)
QKV_ROPE = next(epilogue for epilogue in EPILOGUES if epilogue.suffix == "_qkv_rope")


def _operand(tensor: Tensor) -> Operand:
    return tensor.data_ptr(), TYPES.get(tensor.dtype, 0)


# ------------------------------------------------------------------------------------------------------ what is refused
def _refuses_device(tensor: Tensor) -> str | None:
    if native.module is None:
        return native.status()
    native.cpu_isa()  # what was asked for in the environment may be wrong
    return None if tensor.device.type == "cpu" else f"the tensors are on {tensor.device.type}"


def _refuses_act(spec: ActSpec) -> str | None:
    if spec.group % SPAN and spec.format not in ("int8", "none"):
        return f"it takes groups that are multiples of {SPAN}, not {spec.group}"
    return None


def _refuses_weight(spec: LinearSpec) -> str | None:
    if spec.weight != "int8" and spec.group % SPAN:
        return f"it takes weight groups that are multiples of {SPAN}, not {spec.group}"
    if spec.act.format in ("int4", "uint4", "nvfp4") and spec.act.group != spec.group:
        return f"it takes equal groups of weights and activations, not {spec.group} and {spec.act.group}"
    return _refuses_act(spec.next) if spec.next else None


def folds(spec: LinearSpec, device: torch.device) -> bool:
    """Whether linear_w4a8 runs here on 4-bit weights, folding them as it goes."""
    runs = native.module is not None and device.type == "cpu" and forced_backend() in (None, "cpu")
    return runs and spec.weight in ("int4", "nvfp4") and _refuses_weight(spec) is None


def _refuses_quantize(x: Tensor, *args: Tensor | ActSpec) -> str | None:
    return _refuses_device(x) or _refuses_act(args[-1])


def _refuses_linear(qx: Tensor, *args: Tensor | LinearSpec) -> str | None:
    return _refuses_device(qx) or _refuses_weight(args[-1])


# ----------------------------------------------------------------------------------------------------------- quantizing
def _quantizer(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec, out: tuple[Tensor, Tensor, Tensor]):
    qx, sx, h = out
    return native.module.QuantizeArguments(
        _operand(x), x.shape[0], x.shape[1], inv_smooth.data_ptr(), down.data_ptr(), down.shape[0],
        FORMATS[spec.format], spec.group, spec.shift, qx.data_ptr(), sx.data_ptr(), h.data_ptr(),
        torch.get_num_threads())


def quantize_act(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    x, inv_smooth, down = x.contiguous(), inv_smooth.contiguous(), down.contiguous()
    out = empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)
    _quantizer(x, inv_smooth, down, spec, out).run()
    return out


def norm_modulate_quantize(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> tuple[Tensor, Tensor, Tensor]:
    x, norm_weight, scale, shift, inv_smooth, down = (
        t.contiguous() for t in (x, norm_weight, scale, shift, inv_smooth, down))
    out = empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)
    call = _quantizer(x, inv_smooth, down, spec, out)
    call.set_norm(NORMS[spec.norm], spec.eps, _operand(norm_weight), _operand(scale), _operand(shift), scale.shape[0])
    call.run()
    return out


# -------------------------------------------------------------------------------------------------------------- linears
class _Linear:
    """The first eight operands of a linear op, contiguous and alive while the kernel reads them."""

    def __init__(self, *operands: Tensor, spec: LinearSpec) -> None:
        self.qx, self.sx, self.qw, self.sw, self.aux, self.h, self.up, self.bias = (t.contiguous() for t in operands)
        self.spec = spec
        self.m, self.n = self.qx.shape[0], self.qw.shape[0]
        self.row_scales = self.aux.data_ptr() if spec.row_scales else 0
        self.aux = self.aux[self.n:] if spec.row_scales else self.aux

    def arguments(self, y: Tensor, rows: slice | None = None):
        """The call that writes y; `rows`: of these tokens only."""
        qx, sx, h = (t if rows is None or not t.numel() else t[rows] for t in (self.qx, self.sx, self.h))
        spec = self.spec
        m = rows.stop - rows.start if rows else self.m
        return native.module.LinearArguments(
            m, self.n, spec.k, self.up.shape[1], _operand(qx), _operand(sx), FORMATS[spec.act.format],
            self.qw.data_ptr(), _operand(self.sw), FORMATS[spec.weight], spec.group, _operand(self.aux), h.data_ptr(),
            _operand(self.up), _operand(self.bias), _operand(y), self.row_scales, torch.get_num_threads())

    def store(self) -> Tensor:
        y = self.up.new_empty(self.m, self.n)
        self.arguments(y).run()
        return y

    def gate_residual(self, gate: Tensor, residual: Tensor) -> Tensor:
        gate, residual, y = gate.contiguous(), residual.contiguous(), self.up.new_empty(self.m, self.n)
        call = self.arguments(y)
        call.set_ending(GATE_RESIDUAL, 0, False, _operand(gate), gate.shape[0], residual.data_ptr())
        call.run()
        return y

    def quantized(self, ending: int, inv_smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activated value, quantized for the next linear; some tokens at a time, which stay in the cache."""
        inv_smooth, down, spec = inv_smooth.contiguous(), down.contiguous(), self.spec
        width = self.n // 2 if ending == GLU else self.n
        out = empty_like_quantized(self.up, self.m, width, down, spec.next)
        step = max(64, FUSED_BYTES // max(1, width * self.up.element_size()) // 64 * 64)
        z = self.up.new_empty(min(step, self.m), width)
        for start in range(0, self.m, step):
            rows = slice(start, min(start + step, self.m))
            some = z[: rows.stop - rows.start]
            call = self.arguments(some, rows)
            call.set_ending(ending, ACTIVATIONS[spec.activation], spec.gate_first, NOTHING, 1, 0)
            call.run()
            _quantizer(some, inv_smooth, down, spec.next, tuple(t[rows] if t.numel() else t for t in out)).run()
        return out


def row_scales(weight: QTensor) -> Tensor:
    """s_ch (N) fp32 of fold_int8, without folding."""
    spec = LinearSpec(weight.format.name, weight.format.group, weight.k, ActSpec("int8", 0))
    n, none = weight.codes.shape[0], weight.codes.new_empty(0, dtype=torch.float32)
    aux = weight.zeros if weight.zeros is not None else weight.channel_scale
    out = weight.codes.new_empty(n, dtype=torch.float32)
    call = _Linear(none.view(0, 0), none, weight.codes, weight.scales, none if aux is None else aux, none,
                   none.view(0, 0), none, spec=spec)
    call.arguments(out).run_row_scales()
    return out


def linear(qx, sx, qw, sw, aux, h, up, bias, spec):
    return _Linear(qx, sx, qw, sw, aux, h, up, bias, spec=spec).store()


def linear_gelu_quantize(qx, sx, qw, sw, aux, h, up, bias, next_inv_smooth, next_down, spec):
    return _Linear(qx, sx, qw, sw, aux, h, up, bias, spec=spec).quantized(ACTIVATE, next_inv_smooth, next_down)


def linear_glu_quantize(qx, sx, qw, sw, aux, h, up, bias, next_inv_smooth, next_down, spec):
    return _Linear(qx, sx, qw, sw, aux, h, up, bias, spec=spec).quantized(GLU, next_inv_smooth, next_down)


def linear_gate_residual(qx, sx, qw, sw, aux, h, up, bias, gate, residual, spec):
    return _Linear(qx, sx, qw, sw, aux, h, up, bias, spec=spec).gate_residual(gate, residual)


def linear_qkv_rope(qx, sx, qw, sw, aux, h, up, bias, q_norm, k_norm, rotary, spec):
    """The product natively, in fp32; what follows is the reference's."""
    call = _Linear(qx, sx, qw, sw, aux, h, up, bias, spec=spec)
    y = up.new_empty(call.m, call.n, dtype=torch.float32)
    call.arguments(y).run()
    return QKV_ROPE.apply(y, up.dtype, q_norm, k_norm, rotary, spec)


def _register(op: Op, run: Callable, refuses: Callable[..., str | None]) -> None:
    op.backend("cpu", refuses)(run)


_register(ops.quantize_act, quantize_act, _refuses_quantize)
_register(ops.norm_modulate_quantize, norm_modulate_quantize, _refuses_quantize)
for _suffix, _run in (("", linear), ("_gelu_quantize", linear_gelu_quantize), ("_glu_quantize", linear_glu_quantize),
                      ("_qkv_rope", linear_qkv_rope), ("_gate_residual", linear_gate_residual)):
    for _family in ("linear_w4a4", "linear_w4a8", "linear_w4a16"):
        _register(ops.OPS[_family + _suffix], _run, _refuses_linear)
