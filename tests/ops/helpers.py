"""Arguments for every op, on shapes that divide nothing, and a slow linear in float64 to hold references against."""
import torch

from nunchaku_py.formats import decode, fold_int8, format_of
from nunchaku_py.ops import OPS, ActSpec, AttentionSpec, LinearSpec
from nunchaku_py.ops.quantize_act import unpack
from nunchaku_py.tensor import QTensor

ACTS = {"int4": ActSpec("int4", 64), "uint4": ActSpec("uint4", 64, shift=0.171875), "nvfp4": ActSpec("nvfp4", 16),
        "int8": ActSpec("int8"), "none": ActSpec("none")}
WEIGHTS = {"int4": 64, "uint4": 64, "nvfp4": 16}
ACTS_OF = {"linear_w4a4": ("int4", "uint4", "nvfp4"), "linear_w4a8": ("int8",), "linear_w4a16": ("none",)}
ENDINGS = ("", "_gelu_quantize", "_glu_quantize", "_qkv_rope", "_gate_residual")
SHAPES = [(6, 131, 24, 5), (1, 1, 12, 0), (0, 64, 36, 3), (4, 200, 12, 1)]  # M, K, N, R: N suits every ending
HALF_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # relative error of one rounding


def activation(m, k, rank, act, dtype):
    """x, inv_smooth, down."""
    x = torch.randn(m, k).mul(torch.rand(k) + 0.2).to(dtype)
    x = torch.nn.functional.gelu(x) if act.format == "uint4" else x
    return x, torch.rand(k) + 0.5, (torch.randn(rank, k) / max(k, 1) ** 0.5).to(dtype)


def weight(n, k, name, dtype, folded=False):
    """qw, sw, aux of random weights."""
    q = QTensor.quantize(torch.randn(n, k), format_of(name, WEIGHTS[name]), torch.bfloat16)
    if folded:
        return *q.fold_int8(), torch.empty(0)
    aux = {"uint4": q.zeros, "nvfp4": q.channel_scale}.get(name, torch.empty(0))
    return q.codes, q.scales, aux


def linear_args(family, shape, act="int4", weight_format="int4", dtype=torch.bfloat16, folded=False, **spec):
    """The nine arguments of a plain linear."""
    m, k, n, rank = shape
    x, inv_smooth, down = activation(m, k, rank, ACTS[act], dtype)
    qx, sx, h = OPS["quantize_act"](x, inv_smooth, down, ACTS[act])
    qw, sw, aux = weight(n, k, weight_format, dtype, folded)
    group = 0 if folded else WEIGHTS[weight_format]
    spec = LinearSpec("int8" if folded else weight_format, group, k, ACTS[act], **spec)
    up, bias = torch.randn(n, rank).to(dtype), torch.randn(n).to(dtype)
    return qx, sx, qw, sw, aux, h, up, bias, spec


def ending_args(ending, shape, dtype=torch.bfloat16, next_act="int4"):
    """(extra arguments, spec options) of an epilogue."""
    m, _, n, _ = shape
    if ending in ("_gelu_quantize", "_glu_quantize"):
        width = n // 2 if ending == "_glu_quantize" else n
        options = {"activation": "gelu_tanh" if ending == "_gelu_quantize" else "silu", "next": ACTS[next_act]}
        return (torch.rand(width) + 0.5, torch.randn(3, width).to(dtype)), options
    if ending == "_qkv_rope":
        dim, tokens = 4 if n % 12 == 0 else 2, max(m // 2, 1)
        angle = torch.rand(tokens, dim // 2) * 6
        norms = torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)
        return (*norms, torch.stack((angle.cos(), angle.sin()), -1)), {"head_dim": dim}
    if ending == "_gate_residual":
        samples = 2 if m % 2 == 0 else 1
        return (torch.randn(samples, n).to(dtype), torch.randn(m, n).to(dtype)), {}
    return (), {}


def op_args(name, shape=SHAPES[0], dtype=torch.bfloat16, act=None, weight_format="int4", next_act="int4", folded=False):
    """Arguments of any op by name."""
    m, k, _, rank = shape
    if name == "attention":
        q, k, v = (torch.randn(2, tokens, 3, 8).to(dtype).transpose(1, 2) for tokens in (m, 7, 7))  # as diffusers' are
        return q, k, v, AttentionSpec()
    if name in ("quantize_act", "norm_modulate_quantize"):
        act = ACTS[act or "int4"]
        x, inv_smooth, down = activation(m, k, rank, act, dtype)
        if name == "quantize_act":
            return x, inv_smooth, down, act
        norm = ActSpec(act.format, act.group, act.shift, norm="layer")
        samples = 2 if m % 2 == 0 else 1
        modulation = (torch.randn(samples, k).to(dtype) for _ in range(2))
        return x, torch.rand(k).to(dtype), *modulation, inv_smooth, down, norm
    family, ending = next((f, name[len(f):]) for f in ACTS_OF if name.startswith(f))
    extra, options = ending_args(ending, shape, dtype, next_act)
    args = linear_args(family, shape, act or ACTS_OF[family][0], weight_format, dtype, folded, **options)
    return *args[:-1], *extra, args[-1]


def slow_linear(qx, sx, qw, sw, aux, h, up, bias, spec):
    """y (M,N) in float64, before its rounding."""
    zeros, channel = (aux if spec.weight == name else None for name in ("uint4", "nvfp4"))
    codes, scales = unpack(qw, sw, spec.k, spec.fmt)
    w = decode(codes, scales, spec.fmt, zeros, channel)
    if spec.act.format == "none":
        x, w = qx, w.to(qx.dtype)
    elif spec.act.format == "int8":
        x = qx.double() * sx.double()[:, None]
        if spec.weight != "int8":
            w8, s_ch = fold_int8(codes, scales, spec.fmt, zeros, channel)
            w = w8.double() * s_ch.double()[:, None]
    else:
        x = decode(*unpack(qx, sx, spec.k, spec.act.fmt), spec.act.fmt)
    y = x.double() @ w.double().T + h.double() @ up.double().T + bias.double()
    size = x.double().abs() @ w.double().abs().T + h.double().abs() @ up.double().abs().T + bias.double().abs()
    return y, size


def assert_rounded(got, exact, size):
    """got is exact, rounded once to its dtype; size bounds the terms that were summed in fp32 before."""
    slack = exact.abs() * HALF_STEP[got.dtype] * 1.01 + size * 2**-18
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= slack).all(), (got.double() - exact).abs().max()
