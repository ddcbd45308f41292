"""The calls that are compiled ahead of time: every op in what it can be asked for, for each target what runs there."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from nunchaku_py.ops import OPS, ActSpec, backend
from tests.ops.helpers import ACTS

Calls = Iterator[tuple[str, Callable[[], object]]]
M, K, R = 4608, 3072, 32  # the tokens of a picture of 1024², a transformer's width, the usual rank


def of(target: int) -> Calls:
    yield from quantizing_calls(target)


def quantizing_calls(target: int) -> Calls:
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
    with backend("triton"):
        return OPS[op](*args)
