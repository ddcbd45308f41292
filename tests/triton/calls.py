"""The calls that are compiled ahead of time: every op in what it can be asked for, for each target what runs there."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.formats import format_of
from nunchaku_py.methods import fast
from nunchaku_py.ops import ActSpec, AttentionSpec, LinearSpec
from tests.ops.helpers import ACTS, ENDINGS

Named = tuple[str, Callable[[], object]]
M, N, K, R = 4608, 9216, 3072, 32  # the tokens of a picture of 1024², a transformer's q, k and v, the usual rank
FEW = 64
GROUPS = {"int4": 64, "uint4": 64, "nvfp4": 16, "int8": 0}


def of(target: int) -> Iterator[Named]:
    yield from quantizing_calls()
    yield from linear_calls(target)
    yield from attention_calls(target)
    yield from gptq_calls()


# ----------------------------------------------------------------------------------------------------------- quantizing
def quantizing_calls() -> Iterator[Named]:
    """Of every format what is quantized as it is, and after a norm; besides, many ranks, and odd sizes."""
    bf16, f16 = torch.bfloat16, torch.float16
    for name, spec in ACTS.items():
        yield f"quantize_act {name}", quantizing(spec, bf16)
        for norm in ("layer", "rms"):
            yield f"norm_modulate_quantize {name} {norm}", quantizing(replace(spec, norm=norm), bf16)
    for name in ("int4", "int8"):
        yield f"quantize_act {name} f16", quantizing(ACTS[name], f16)
        yield f"quantize_act {name} no ranks", quantizing(ACTS[name], bf16, r=0)
        yield f"quantize_act {name} many ranks", quantizing(ACTS[name], bf16, r=160)
        yield f"norm_modulate_quantize {name} odd", quantizing(replace(ACTS[name], norm="layer"), bf16, 66, 331, 40)


def quantizing(spec: ActSpec, dtype: torch.dtype, m: int = M, k: int = K, r: int = R) -> Callable[[], object]:
    """quantize_act or norm_modulate_quantize, two samples of it."""
    x, inv_smooth, down = torch.empty(m, k, dtype=dtype), torch.empty(k), torch.empty(r, k, dtype=dtype)
    if spec.norm == "none":
        return partial(_called, "quantize_act", x, inv_smooth, down, spec)
    weight, modulation = torch.empty(k, dtype=dtype), torch.empty(2, k, dtype=dtype)
    return partial(_called, "norm_modulate_quantize", x, weight, modulation, modulation, inv_smooth, down, spec)


def _called(op: str, *args: object) -> object:
    with ops.backend("triton"):
        return ops.OPS[op](*args)


# -------------------------------------------------------------------------------------------------------------- linears
def linear_calls(target: int) -> Iterator[Named]:
    """Each way to sum with each ending, in bfloat16; the plain one in float16, and for few rows, too."""
    ways = [("linear_w4a8", "int8", "int8", "int8"), ("linear_w4a8", "int8", "int4", "int8"),
            ("linear_w4a8", "int8", "nvfp4", "int8"), ("linear_w4a16", "none", "int4", "none"),
            ("linear_w4a16", "none", "uint4", "none"), ("linear_w4a16", "none", "nvfp4", "none"),
            ("linear_w4a4", "int4", "int4", "int4"), ("linear_w4a4", "uint4", "int4", "uint4")]
    if target >= 120:
        ways.append(("linear_w4a4", "nvfp4", "nvfp4", "nvfp4"))
    for family, act, weight, following in ways:
        for m in (M, FEW, 1):
            yield linear_call(family, "", act, weight, following, m)
        yield linear_call(family, "", act, weight, following, M, torch.float16)
        for ending in ENDINGS[1:] if weight in ("int8", act) else ():
            yield linear_call(family, ending, act, weight, following, M)


def linear_call(family: str, ending: str, act: str, weight: str, following: str, m: int,
                dtype: torch.dtype = torch.bfloat16) -> Named:
    spec = LinearSpec(weight, GROUPS[weight], K, ACTS[act], row_scales=act == "int8" and weight != "int8")
    args = [*activation(m, act, dtype), *weights(weight, act == "int8", dtype), torch.zeros(m, R),
            torch.zeros(N, R, dtype=dtype), torch.zeros(N, dtype=dtype)]
    extra, more = ended(ending, m, following, dtype)
    op, call = ops.OPS[family + ending], (*args, *extra, LinearSpec(**{**_fields(spec), **more}))
    name = f"{op.name}: {act} x {weight}, {m} rows, {str(dtype).removeprefix('torch.')}"

    return name, partial(_called, op.name, *call)


def _fields(spec: LinearSpec) -> dict:
    return {"weight": spec.weight, "group": spec.group, "k": spec.k, "act": spec.act, "row_scales": spec.row_scales}


def activation(m: int, act: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if act == "none":
        return torch.zeros(m, K, dtype=dtype), torch.zeros(0)
    if act == "int8":
        return torch.zeros(m, K, dtype=torch.int8), torch.zeros(m)
    scales = torch.zeros(m, K // GROUPS[act], dtype=dtype)
    return torch.zeros(m, K // 2, dtype=torch.uint8), scales.to(torch.float8_e4m3fn) if act == "nvfp4" else scales


def weights(weight: str, row_scales: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if weight == "int8":
        return torch.zeros(N, K, dtype=torch.int8), torch.zeros(N), torch.zeros(0)
    scales = torch.zeros(N, K // GROUPS[weight], dtype=dtype)
    scales = scales.to(torch.float8_e4m3fn) if weight == "nvfp4" else scales
    aux = {"uint4": scales, "nvfp4": torch.zeros(N)}.get(weight, torch.zeros(0))
    return torch.zeros(N, K // 2, dtype=torch.uint8), scales, torch.cat((torch.zeros(N), aux)) if row_scales else aux


def ended(ending: str, m: int, following: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict]:
    """What an ending takes, and what the spec says of it."""
    if ending == "_gate_residual":
        return (torch.zeros(1, N, dtype=dtype), torch.zeros(m, N, dtype=dtype)), {}
    if ending == "_qkv_rope":
        return (torch.zeros(128), torch.zeros(128), torch.zeros(m, 64, 2)), {"head_dim": 128}
    if not ending:
        return (), {}
    width = N // 2 if ending == "_glu_quantize" else N
    more = {"activation": "silu" if width < N else "gelu_tanh", "next": ACTS[following]}
    return (torch.zeros(width), torch.zeros(R, width, dtype=dtype)), more


# ------------------------------------------------------------------------------------------------------------ attention
def attention_calls(target: int) -> Iterator[Named]:
    """Self attention of a picture of 1024² with heads of 128 and 64 channels; cross attention to 77 keys; and one of
    everything, as sizes of 1 are constants to Triton."""
    for products in ("16bit", "fp8") if target >= 89 else ("16bit",):
        for dtype in (torch.bfloat16, torch.float16):
            yield attention_call(products, 128, 4608, dtype)
        yield attention_call(products, 64, 4096)
        yield attention_call(products, 64, 77)
        yield attention_call(products, 128, 4600)
        yield attention_call(products, 64, 1, tokens=1, heads=1)


def attention_call(products: str, dim: int, keys: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 4608,
                   heads: int = 24) -> Named:
    q, k, v = (torch.empty(1, rows, heads, dim, dtype=dtype).transpose(1, 2) for rows in (tokens, keys, keys))
    spec = AttentionSpec(products)

    def run() -> object:
        with ops.backend("triton"):
            return ops.attention(q, k, v, spec)

    return f"attention: {products}, {dim} channels, {keys} keys, {str(dtype).removeprefix('torch.')}", run


# ------------------------------------------------------------------------------------------------- weights' quantizing
def gptq_calls() -> Iterator[Named]:
    """GPTQ's column loop over whole and odd tiles."""
    for name in ("int4", "nvfp4"):
        for n, k in ((3072, 128), (331, 66)):
            yield f"gptq {name} {n}x{k}", partial(_swept, name, n, k)


def _swept(name: str, n: int, k: int) -> None:
    columns, step = torch.empty(k, n), torch.empty(2, n)
    fmt = format_of(name)
    with ops.backend("triton"):
        fast.sweep(columns, torch.empty(k, n), torch.empty(k, k), step, step, torch.zeros(k, dtype=torch.int64), fmt)
