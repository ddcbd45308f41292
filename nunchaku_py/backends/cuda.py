"""The ops on NVIDIA GPUs, by the native module (csrc/cuda): INT4 weights and activations in groups of 64.

Codes lie as the file holds them. Scales lie in the layout "mma" (ops/spec.py), in the order in which threads read them:
those of weights are put there by `packed_scales`, once; those of activations by the kernels.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native, ops
from ..layout import Layout
from ..ops.checks import Expected, expect, expect_matrix, short
from ..ops.epilogue import EPILOGUES
from ..ops.quantize_act import empty_like_quantized
from ..ops.registry import Op, forced_backend
from ..ops.spec import MMA, ROW, ActSpec, LinearSpec, padded_rows

DEVICE = "cuda"
GROUP = 64
OLDEST, OLDEST_INT4 = 75, 80  # compute capabilities, of all and of INT4's kernels: setup.py's CUDA_SOURCES
TYPES = {torch.bfloat16: 1, torch.float16: 2}
NORMS = {"layer": 1, "rms": 2}
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}
RANKS, NEXT_RANKS = 16, 8  # the kernels multiply by so many ranks at a time: of up, of the next linear's down
WARP = 32
FEW = 64  # rows that the kernel of linear_w4a16 takes: it decodes the weight anew for every four
WIDEST_HEAD = 128  # a head lies in one tile
REACH = 2**32  # bytes that an offset in a kernel can say
_CHANNELS = Layout("(N n:8 t:4 e:2) (G) -> G N t n e")
_EPILOGUES = {epilogue.suffix: epilogue for epilogue in EPILOGUES}


# -------------------------------------------------------------------------------------------------------------- packing
def packed_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, rows padded to 64) of a weight's scales (N,G)."""
    padded = _CHANNELS.pad(scales.to(dtype))
    return _CHANNELS.pack(padded).view(padded.shape[1], padded.shape[0])


def asked_for(device: torch.device) -> bool:
    """Whether the kernels would be asked first on this device."""
    if device.type != DEVICE:
        return False
    return torch.compiler.is_compiling() or forced_backend() in (None, "cuda")  # a compiler cannot look


def why_not_packed(spec: LinearSpec, n: int, scales: Tensor, dtype: torch.dtype) -> str | None:
    """Why a weight's scales stay as the file holds them, on this device and for activations of this dtype."""
    if scales.device.type == DEVICE and not asked_for(scales.device):
        return f"the backend '{forced_backend()}' is asked for"
    refused = _refuses_device(scales) or _refuses_dtype(dtype) or _refuses_weight(spec, n)
    if refused is None and not torch.equal(scales.to(dtype).float(), scales.float()):
        return f"its scales are no {short(dtype)} numbers"
    return refused


# ------------------------------------------------------------------------------------------------------ what is refused
def _refuses_device(tensor: Tensor, oldest: int = OLDEST_INT4) -> str | None:
    if not hasattr(native.module, "cuda"):
        return native.status()
    if tensor.device.type != DEVICE:
        return f"the tensors are on {tensor.device.type}"
    return _refuses_capability(_capability(tensor.device), oldest)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _refuses_capability(capability: tuple[int, int], oldest: int) -> str | None:
    major, minor = capability
    if major * 10 + minor < oldest:
        return f"its kernels need compute capability {oldest / 10}, this GPU has {major}.{minor}"
    if not any(runs_on(target, capability) for target in native.cuda_targets()):
        return f"it was not built for compute capability {major}.{minor}, but for {', '.join(native.cuda_targets())}"
    return None


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for a target ("86", "90a") runs on a GPU: of its own generation, no newer, and exactly it
    where the target is architecture-specific."""
    number = int(target.rstrip("af"))
    major, minor = divmod(number, 10)
    return (major, minor) == capability if target[-1] == "a" else major == capability[0] and minor <= capability[1]


def _refuses_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in TYPES else f"it computes in bfloat16 or float16, not {short(dtype)}"


def _refuses_act(spec: ActSpec, k: int) -> str | None:
    if spec.format not in ("int4", "uint4") or spec.group != GROUP:
        return f"its activations are INT4 in groups of {GROUP}, not {spec.format} in groups of {spec.group}"
    return f"it takes inputs in whole groups of {GROUP}, not {k}" if k % GROUP else None


def _refuses_weight(spec: LinearSpec, n: int) -> str | None:
    if spec.weight != "int4" or spec.group != GROUP:
        return f"its weights are INT4 in groups of {GROUP}, not {spec.weight} in groups of {spec.group}"
    if n % 16:
        return f"it takes output channels in multiples of 16, not {n}"
    if n * spec.k // 2 >= REACH:
        return f"a weight of {n} x {spec.k} is too large for its offsets"
    return _refuses_act(spec.act, spec.k)


def _refuses_quantize(x: Tensor, *args: Tensor | ActSpec) -> str | None:
    return _refuses_device(x) or _refuses_dtype(x.dtype) or _refuses_act(args[-1], x.shape[1])


def _refuses_linear(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, *args: Tensor | LinearSpec) -> str | None:
    spec, up = args[-1], args[2]
    refused = _refuses_device(qx) or _refuses_dtype(up.dtype) or _refuses_weight(spec, qw.shape[0])
    if refused:
        return refused
    if qx.shape[0] * spec.k // 2 >= REACH:
        return f"{qx.shape[0]} rows of {spec.k} are too many for its offsets"
    return None if sw.dtype == up.dtype else _other_scales(sw, up)


def _other_scales(sw: Tensor, up: Tensor) -> str:
    return f"the weight's scales are {short(sw.dtype)}, and it computes in {short(up.dtype)}"


def _refuses_few(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, *args: Tensor | LinearSpec) -> str | None:
    """Of the kernel for few rows, which reads everything in rows."""
    spec, up = args[-1], args[2]
    refused = _refuses_device(qx, OLDEST) or _refuses_dtype(up.dtype)
    if refused:
        return refused
    if spec.weight not in ("int4", "uint4") or spec.group % WARP or spec.k % WARP:
        return (f"it takes INT4 weights, and inputs and groups in multiples of {WARP}, not {spec.weight}, {spec.k} and "
                f"{spec.group}")
    if qx.shape[0] > FEW:
        return f"it is for {FEW} rows at most, not {qx.shape[0]}"
    return None if sw.dtype == up.dtype else _other_scales(sw, up)


def _refuses_signed(*args: Tensor | LinearSpec) -> str | None:
    if args[-1].act.format == "uint4":
        return "this ending takes no unsigned codes, which follow a GELU"
    return _refuses_linear(*args)


def _refuses_next(parts: int) -> Callable[..., str | None]:
    """Of an ending that makes one column of the next input from so many of its own."""
    def refuses(*args: Tensor | LinearSpec) -> str | None:
        return _refuses_signed(*args) or _refuses_act(args[-1].next, args[2].shape[0] // parts)

    return refuses


def _refuses_heads(*args: Tensor | LinearSpec) -> str | None:
    dim = args[-1].head_dim
    if dim & (dim - 1) or not 8 <= dim <= WIDEST_HEAD:
        return f"it takes heads of 8, 16 … {WIDEST_HEAD}, not {dim}"
    return _refuses_signed(*args)


# ----------------------------------------------------------------------------------------------------------- quantizing
def _where(tensor: Tensor) -> tuple[int, int]:
    """(device, stream)"""
    if tensor.device.type != "cuda":  # tests: kernels that run on the host
        return 0, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _aligned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As kernels read it: contiguous, from a multiple of 16 bytes on, of this dtype."""
    tensor = (tensor if dtype is None else tensor.to(dtype)).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _quantizer(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec, out: tuple[Tensor, Tensor, Tensor]):
    qx, sx, h = out
    return native.module.cuda.QuantizeArguments(
        *_where(x), TYPES[x.dtype], x.shape[0], x.shape[1], down.shape[0], x.data_ptr(), inv_smooth.data_ptr(),
        down.data_ptr(), spec.format == "uint4", spec.shift, qx.data_ptr(), sx.data_ptr(), h.data_ptr())


def quantize_act(x: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec) -> tuple[Tensor, Tensor, Tensor]:
    x, inv_smooth, down = map(_aligned, (x, inv_smooth, down))
    out = empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)
    if x.shape[0]:
        native.module.cuda.quantize_act(_quantizer(x, inv_smooth, down, spec, out))
    return out


def norm_modulate_quantize(
    x: Tensor, norm_weight: Tensor, scale: Tensor, shift: Tensor, inv_smooth: Tensor, down: Tensor, spec: ActSpec
) -> tuple[Tensor, Tensor, Tensor]:
    x, inv_smooth, down = map(_aligned, (x, inv_smooth, down))
    norm_weight, scale, shift = (_aligned(tensor, x.dtype) for tensor in (norm_weight, scale, shift))
    out = empty_like_quantized(x, x.shape[0], x.shape[1], down, spec)
    if x.shape[0]:
        call = _quantizer(x, inv_smooth, down, spec, out)
        call.set_norm(NORMS[spec.norm], spec.eps, norm_weight.data_ptr(), scale.data_ptr(), shift.data_ptr(),
                      scale.shape[0])
        native.module.cuda.norm_modulate_quantize(call)
    return out


# -------------------------------------------------------------------------------------------------------------- linears
class _Linear:
    """The operands of a linear op, as kernels read them, alive until the kernel is on its stream."""

    def __init__(self, operands: tuple[Tensor, ...], spec: LinearSpec) -> None:
        qx, sx, qw, sw, _, h, up, bias = operands
        expect(qx, _operands(qx, sx, qw, sw, h, up, bias, spec))
        if ranks := -up.shape[1] % RANKS:
            h, up = F.pad(h, (0, ranks)), F.pad(up, (0, ranks))
        self.qx, self.sx, self.qw, self.sw, self.h, self.up = map(_aligned, (qx, sx, qw, sw, h, up))
        self.bias, self.spec = _aligned(bias, torch.float32), spec
        self.m, self.n = qx.shape[0], qw.shape[0]

    def arguments(self):
        return native.module.cuda.LinearArguments(
            *_where(self.qx), TYPES[self.up.dtype], self.m, self.n, self.spec.k, self.up.shape[1], self.qx.data_ptr(),
            self.sx.data_ptr(), self.spec.act.format == "uint4", self.qw.data_ptr(), self.sw.data_ptr(),
            self.h.data_ptr(), self.up.data_ptr(), self.bias.data_ptr())

    def expect_more(self, suffix: str, *extra: Tensor) -> None:
        expect(self.qx, _EPILOGUES[suffix].check(self.up, self.m, self.n, *extra, self.spec))

    def quantized(self, suffix: str, width: int, inv_smooth: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activated value, `width` columns, quantized for the next linear."""
        self.expect_more(suffix, inv_smooth, down)
        spec, kernels = self.spec.next, native.module.cuda
        out = empty_like_quantized(self.up, self.m, width, down, spec)
        if self.m == 0:
            return out
        missing = -down.shape[0] % NEXT_RANKS
        inv_smooth, padded = _aligned(inv_smooth), _aligned(F.pad(down, (0, 0, 0, missing)) if missing else down)
        count = kernels.gelu_parts if suffix == "_gelu_quantize" else kernels.glu_parts
        parts = out[2].new_empty(count(_where(self.qx)[0], self.m, self.n), self.m, padded.shape[0])
        h = out[2].new_empty(parts.shape[1:]) if missing else out[2]
        run = getattr(kernels, f"linear_w4a4{suffix}")
        run(self.arguments(), kernels.NextArguments(
            ACTIVATIONS[self.spec.activation], self.spec.gate_first, spec.format == "uint4", spec.shift,
            inv_smooth.data_ptr(), padded.data_ptr(), padded.shape[0], out[0].data_ptr(), out[1].data_ptr(),
            h.data_ptr(), parts.data_ptr()))
        return out[0], out[1], h[:, :down.shape[0]].contiguous()


def _operands(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, h: Tensor, up: Tensor, bias: Tensor, spec: LinearSpec
              ) -> tuple[Expected, ...]:
    for name, tensor in (("qx", qx), ("qw", qw), ("h", h), ("up", up)):
        expect_matrix(name, "of rows", tensor)
    m, n, groups, codes = qx.shape[0], qw.shape[0], spec.k // GROUP, (torch.uint8,)
    return (
        ("qx", qx, "(rows, in/2)", (m, spec.k // 2), codes),
        ("sx", sx, "(groups, padded rows)", (groups, padded_rows(m)), (up.dtype,)),
        ("qw", qw, "(out, in/2)", (n, spec.k // 2), codes),
        ("sw", sw, "(groups, padded out)", (groups, padded_rows(n)), (up.dtype,)),
        ("h", h, "(rows, rank)", (m, up.shape[1]), (torch.float32,)),
        ("up", up, "(out, rank)", (n, up.shape[1]), None),
        ("bias", bias, "(out)", (n,), None),
    )


def linear_w4a16(qx, sx, qw, sw, aux, h, up, bias, spec):
    y = up.new_empty(qx.shape[0], qw.shape[0])
    if not y.numel():
        return y
    x, qw, sw, h, up = map(_aligned, (qx, qw, sw, h, up))
    zeros, bias = _aligned(aux, up.dtype), _aligned(bias, torch.float32)
    kernels = native.module.cuda
    kernels.linear_w4a16(kernels.FewRowsArguments(
        *_where(x), TYPES[x.dtype], *y.shape, spec.k, up.shape[1], spec.group, x.data_ptr(), qw.data_ptr(),
        sw.data_ptr(), zeros.data_ptr() if spec.weight == "uint4" else 0, h.data_ptr(), up.data_ptr(), bias.data_ptr(),
        y.data_ptr()))
    return y


def linear_w4a4(qx, sx, qw, sw, aux, h, up, bias, spec):
    call = _Linear((qx, sx, qw, sw, aux, h, up, bias), spec)
    y = up.new_empty(call.m, call.n)
    if call.m:
        native.module.cuda.linear_w4a4(call.arguments(), y.data_ptr())
    return y


def linear_w4a4_gate_residual(qx, sx, qw, sw, aux, h, up, bias, gate, residual, spec):
    call = _Linear((qx, sx, qw, sw, aux, h, up, bias), spec)
    call.expect_more("_gate_residual", gate, residual)
    gate, residual, y = _aligned(gate, up.dtype), _aligned(residual), up.new_empty(call.m, call.n)
    if not call.m:
        return y
    native.module.cuda.linear_w4a4_gate_residual(call.arguments(), native.module.cuda.GateResidualArguments(
        gate.data_ptr(), residual.data_ptr(), gate.shape[0], y.data_ptr()))
    return y


def linear_w4a4_qkv_rope(qx, sx, qw, sw, aux, h, up, bias, q_norm, k_norm, rotary, spec):
    call = _Linear((qx, sx, qw, sw, aux, h, up, bias), spec)
    call.expect_more("_qkv_rope", q_norm, k_norm, rotary)
    q_norm, k_norm, rotary = (_aligned(tensor, torch.float32) for tensor in (q_norm, k_norm, rotary))
    q, k, v = (up.new_empty(call.m, call.n // 3) for _ in range(3))
    if not call.m:
        return q, k, v
    native.module.cuda.linear_w4a4_qkv_rope(call.arguments(), native.module.cuda.QkvRopeArguments(
        q_norm.data_ptr(), k_norm.data_ptr(), rotary.data_ptr(), spec.head_dim, rotary.shape[0], spec.eps,
        q.data_ptr(), k.data_ptr(), v.data_ptr()))
    return q, k, v


def linear_w4a4_gelu_quantize(qx, sx, qw, sw, aux, h, up, bias, next_inv_smooth, next_down, spec):
    call = _Linear((qx, sx, qw, sw, aux, h, up, bias), spec)
    return call.quantized("_gelu_quantize", call.n, next_inv_smooth, next_down)


def linear_w4a4_glu_quantize(qx, sx, qw, sw, aux, h, up, bias, next_inv_smooth, next_down, spec):
    call = _Linear((qx, sx, qw, sw, aux, h, up, bias), spec)
    return call.quantized("_glu_quantize", call.n // 2, next_inv_smooth, next_down)


def _register(op: Op, run: Callable, refuses: Callable[..., str | None], layout: str = MMA) -> None:
    op.backend("cuda", refuses, layouts=(layout,))(run)


_register(ops.quantize_act, quantize_act, _refuses_quantize)
_register(ops.norm_modulate_quantize, norm_modulate_quantize, _refuses_quantize)
_register(ops.linear_w4a16, linear_w4a16, _refuses_few, ROW)
_register(ops.linear_w4a4, linear_w4a4, _refuses_linear)
_register(ops.linear_w4a4_gate_residual, linear_w4a4_gate_residual, _refuses_linear)
_register(ops.linear_w4a4_qkv_rope, linear_w4a4_qkv_rope, _refuses_heads)
_register(ops.linear_w4a4_gelu_quantize, linear_w4a4_gelu_quantize, _refuses_next(1))
_register(ops.linear_w4a4_glu_quantize, linear_w4a4_glu_quantize, _refuses_next(2))
