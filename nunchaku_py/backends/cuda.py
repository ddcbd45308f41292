"""The ops on NVIDIA GPUs, by the native module (csrc/cuda): INT4 weights and activations in groups of 64.

Codes lie as the file holds them. Scales lie in the layout "mma" (ops/spec.py), in the order in which threads read them:
those of weights are put there by `packed_scales`, once; those of activations by the kernels.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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
OLDEST, OLDEST_BF16 = 75, 80  # compute capabilities; 7.5 multiplies float16 only
TYPES = {torch.bfloat16: 1, torch.float16: 2}
NORMS = {"layer": 1, "rms": 2}
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}
RANKS, NEXT_RANKS = 16, 8  # the kernels multiply by so many ranks at a time: of up, of the next linear's down
WARP = 32
WIDEST_HEAD = 128  # a head lies in one tile
TOGETHER = 6  # linears of a launch: kernel.cuh's PARTS
LONGEST = 2**16 * GROUP  # inputs whose groups a kernel counts in 16 bits
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
    refused = _refuses_device(scales) or _refuses_dtype(dtype, scales.device) or _refuses_weight(spec, n)
    if refused is None and not torch.equal(scales.to(dtype).float(), scales.float()):
        return f"its scales are no {short(dtype)} numbers"
    return refused


# ------------------------------------------------------------------------------------------------------ what is refused
def _refuses_device(tensor: Tensor) -> str | None:
    if not hasattr(native.module, "cuda"):
        return native.status()
    if tensor.device.type != DEVICE:
        return f"the tensors are on {tensor.device.type}"
    return _refuses_driver() or _refuses_capability(_capability(tensor.device))


@cache
def _refuses_driver() -> str | None:
    return native.why_not_this_driver() or None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _refuses_capability(capability: tuple[int, int]) -> str | None:
    major, minor = capability
    if major * 10 + minor < OLDEST:
        return f"its kernels need compute capability {OLDEST / 10}, this GPU has {major}.{minor}"
    if not any(runs_on(target, capability) for target in native.cuda_targets()):
        return f"it was not built for compute capability {major}.{minor}, but for {', '.join(native.cuda_targets())}"
    return None


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for a target ("86", "90a") runs on a GPU: of its own generation, no newer, and exactly it
    where the target is architecture-specific."""
    number = int(target.rstrip("af"))
    major, minor = divmod(number, 10)
    return (major, minor) == capability if target[-1] == "a" else major == capability[0] and minor <= capability[1]


def _refuses_dtype(dtype: torch.dtype, device: torch.device, oldest_bf16: int = OLDEST_BF16) -> str | None:
    if dtype not in TYPES:
        return f"it computes in bfloat16 or float16, not {short(dtype)}"
    major, minor = _capability(device)
    if dtype == torch.bfloat16 and major * 10 + minor < oldest_bf16:
        return (f"a GPU of compute capability {major}.{minor} multiplies no bfloat16: model.to(torch.float16) runs on "
                "its kernels")
    return None


def _refuses_act(spec: ActSpec, k: int) -> str | None:
    if spec.format not in ("int4", "uint4") or spec.group != GROUP:
        return f"its activations are INT4 in groups of {GROUP}, not {spec.format} in groups of {spec.group}"
    if k >= LONGEST:
        return f"it takes fewer than {LONGEST} inputs, not {k}"
    return None if k and k % GROUP == 0 else f"it takes inputs in whole groups of {GROUP}, not {k}"


def _refuses_weight(spec: LinearSpec, n: int) -> str | None:
    if spec.weight != "int4" or spec.group != GROUP:
        return f"its weights are INT4 in groups of {GROUP}, not {spec.weight} in groups of {spec.group}"
    if n % 16:
        return f"it takes output channels in multiples of 16, not {n}"
    return _refuses_act(spec.act, spec.k)


def _refuses_quantize(x: Tensor, *args: Tensor | ActSpec) -> str | None:
    return _refuses_device(x) or _refuses_dtype(x.dtype, x.device) or _refuses_act(args[-1], x.shape[1])


def _refuses_linear(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, *args: Tensor | LinearSpec) -> str | None:
    spec, up = args[-1], args[2]
    refused = _refuses_device(qx) or _refuses_dtype(up.dtype, qx.device) or _refuses_weight(spec, qw.shape[0])
    if refused:
        return refused
    return None if sw.dtype == up.dtype else _other_scales(sw, up)


def _other_scales(sw: Tensor, up: Tensor) -> str:
    return f"the weight's scales are {short(sw.dtype)}, and it computes in {short(up.dtype)}"


def _refuses_decoding(qx: Tensor, sx: Tensor, qw: Tensor, sw: Tensor, *args: Tensor | LinearSpec) -> str | None:
    """Of linear_w4a16, which reads everything in rows."""
    spec, up = args[-1], args[2]
    refused = _refuses_device(qx) or _refuses_dtype(up.dtype, qx.device, OLDEST)  # or without tensor cores
    if refused:
        return refused
    if spec.weight not in ("int4", "uint4") or spec.group % WARP or spec.k % WARP:
        return (f"it takes INT4 weights, and inputs and groups in multiples of {WARP}, not {spec.weight}, {spec.k} and "
                f"{spec.group}")
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
def _whole_ranks(h: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    missing = -up.shape[1] % RANKS
    return (F.pad(h, (0, missing)), F.pad(up, (0, missing))) if missing else (h, up)


class _Linear:
    """The operands of a linear op, as kernels read them, and what else its ending takes: alive until the kernel is on
    its stream."""

    def __init__(self, args: tuple) -> None:
        (qx, sx, qw, sw, _, h, up, bias), self.extra, self.spec = args[:8], args[8:-1], args[-1]
        expect(qx, _operands(qx, sx, qw, sw, h, up, bias, self.spec))
        h, up = _whole_ranks(h, up)
        self.qx, self.sx, self.qw, self.sw, self.h, self.up = map(_aligned, (qx, sx, qw, sw, h, up))
        self.bias = _aligned(bias, torch.float32)
        self.m, self.n = qx.shape[0], qw.shape[0]

    def arguments(self):
        return native.module.cuda.LinearArguments(
            *_where(self.qx), TYPES[self.up.dtype], self.m, self.n, self.spec.k, self.up.shape[1], self.qx.data_ptr(),
            self.sx.data_ptr(), self.spec.act.format == "uint4", self.qw.data_ptr(), self.sw.data_ptr(),
            self.h.data_ptr(), self.up.data_ptr(), self.bias.data_ptr())

    def expect_more(self, suffix: str) -> None:
        expect(self.qx, _EPILOGUES[suffix].check(self.up, self.m, self.n, *self.extra, self.spec))

    def keep(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.extra = tensors
        return tensors


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
    h, up = _whole_ranks(h, up)
    x, qw, sw, h, up = map(_aligned, (qx, qw, sw, h, up))
    zeros, bias = _aligned(aux, up.dtype), _aligned(bias, torch.float32)
    kernels = native.module.cuda
    kernels.linear_w4a16(kernels.DecodedArguments(
        *_where(x), TYPES[x.dtype], *y.shape, spec.k, up.shape[1], spec.group, x.data_ptr(), qw.data_ptr(),
        sw.data_ptr(), zeros.data_ptr() if spec.weight == "uint4" else 0, h.data_ptr(), up.data_ptr(), bias.data_ptr(),
        y.data_ptr()))
    return y


# -------------------------------------------------------------------------------- endings: their arguments, and results
Ended = tuple[object, Callable[[], object]]
Ending = Callable[[list[_Linear]], list[Ended]]


def _stored(linears: list[_Linear]) -> list[Ended]:
    def one(linear: _Linear) -> Ended:
        y = linear.up.new_empty(linear.m, linear.n)
        return native.module.cuda.StoreArguments(y.data_ptr()), lambda: y

    return list(map(one, linears))


def _gated(linears: list[_Linear]) -> list[Ended]:
    def one(linear: _Linear) -> Ended:
        linear.expect_more("_gate_residual")
        gate, residual = linear.extra
        gate, residual = linear.keep(_aligned(gate, linear.up.dtype), _aligned(residual))
        y = linear.up.new_empty(linear.m, linear.n)
        return native.module.cuda.GateResidualArguments(
            gate.data_ptr(), residual.data_ptr(), gate.shape[0], y.data_ptr()), lambda: y

    return list(map(one, linears))


def _rotated(linears: list[_Linear]) -> list[Ended]:
    def one(linear: _Linear) -> Ended:
        linear.expect_more("_qkv_rope")
        q_norm, k_norm, rotary = linear.keep(*(_aligned(tensor, torch.float32) for tensor in linear.extra))
        out = tuple(linear.up.new_empty(linear.m, linear.n // 3) for _ in range(3))
        return native.module.cuda.QkvRopeArguments(
            q_norm.data_ptr(), k_norm.data_ptr(), rotary.data_ptr(), linear.spec.head_dim, rotary.shape[0],
            linear.spec.eps, *(tensor.data_ptr() for tensor in out)), lambda: out

    return list(map(one, linears))


def _quantized(suffix: str, columns: int) -> Ending:
    """Of endings that quantize for the next linear, one column for so many of y."""
    def ending(linears: list[_Linear]) -> list[Ended]:
        kernels = native.module.cuda
        count = kernels.gelu_parts if suffix == "_gelu_quantize" else kernels.glu_parts
        counts = count(_where(linears[0].qx)[0], [(linear.m, linear.n) for linear in linears])
        return [_quantized_one(linear, suffix, linear.n // columns, parts)
                for linear, parts in zip(linears, counts, strict=True)]

    return ending


def _quantized_one(linear: _Linear, suffix: str, width: int, parts: int) -> Ended:
    linear.expect_more(suffix)
    inv_smooth, down = linear.extra
    spec, ranks = linear.spec.next, down.shape[0]
    out = empty_like_quantized(linear.up, linear.m, width, down, spec)
    missing = -ranks % NEXT_RANKS
    padded = F.pad(down, (0, 0, 0, missing)) if missing else down
    inv_smooth, padded, part = linear.keep(
        _aligned(inv_smooth), _aligned(padded), out[2].new_empty(parts, linear.m, padded.shape[0]))
    h = out[2].new_empty(part.shape[1:]) if missing else out[2]
    return native.module.cuda.NextArguments(
        ACTIVATIONS[linear.spec.activation], linear.spec.gate_first, spec.format == "uint4", spec.shift,
        inv_smooth.data_ptr(), padded.data_ptr(), padded.shape[0], out[0].data_ptr(), out[1].data_ptr(), h.data_ptr(),
        part.data_ptr()), lambda: (out[0], out[1], h[:, :ranks].contiguous())


# ------------------------------------------------------------------------------------------------------------- launches
def _launches(calls: Sequence[tuple]) -> list[list[int]]:
    """Which calls go in a launch: those of one type and sign, so many at most."""
    alike: dict[tuple, list[int]] = {}
    for i, args in enumerate(calls):
        alike.setdefault((args[6].dtype, args[-1].act.format, args[0].device), []).append(i)
    return [mine[i:i + TOGETHER] for mine in alike.values() for i in range(0, len(mine), TOGETHER)]


def _launch(name: str, calls: list[tuple], ending: Ending) -> list[object]:
    linears = [_Linear(args) for args in calls]
    ended = ending(linears)
    if any(linear.m and linear.n for linear in linears):
        getattr(native.module.cuda, name)(
            [(linear.arguments(), to) for linear, (to, _) in zip(linears, ended, strict=True)])
    return [result() for _, result in ended]


def _linear_backend(op: Op, ending: Ending, refuses: Callable[..., str | None]) -> None:
    """Registers an op of linear_w4a4 by its ending."""
    def together(calls: Sequence[tuple]) -> list[object]:
        results: dict[int, object] = {}
        for mine in _launches(calls):
            results |= zip(mine, _launch(op.name, [calls[i] for i in mine], ending), strict=True)
        return [results[i] for i in range(len(calls))]

    def run(*args: Tensor | LinearSpec) -> object:
        return _launch(op.name, [args], ending)[0]

    run.__signature__ = inspect.signature(op.reference)
    op.backend("cuda", refuses, (MMA,), together)(run)


ops.quantize_act.backend("cuda", _refuses_quantize, (MMA,))(quantize_act)
ops.norm_modulate_quantize.backend("cuda", _refuses_quantize, (MMA,))(norm_modulate_quantize)
ops.linear_w4a16.backend("cuda", _refuses_decoding, (ROW,))(linear_w4a16)
_linear_backend(ops.linear_w4a4, _stored, _refuses_linear)
_linear_backend(ops.linear_w4a4_gate_residual, _gated, _refuses_linear)
_linear_backend(ops.linear_w4a4_qkv_rope, _rotated, _refuses_heads)
_linear_backend(ops.linear_w4a4_gelu_quantize, _quantized("_gelu_quantize", 1), _refuses_next(1))
_linear_backend(ops.linear_w4a4_glu_quantize, _quantized("_glu_quantize", 2), _refuses_next(2))
