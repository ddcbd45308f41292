"""Small arguments for every op, so that its backends can be asked whether they would run it on this machine."""
from __future__ import annotations

from typing import Any

import torch

from ..backends.cuda import device as gpu
from ..formats import group_count
from ..ops.registry import Op, forced_backend
from ..ops.spec import MMA, ROW, ActSpec, AttentionSpec, LinearSpec, mma_scales

M, K, N, R, HEAD = 128, 384, 384, 32, 64
GROUPS = {"int4": 64, "nvfp4": 16}
ACTS = {"linear_w4a8": "int8", "linear_w4a16": "none"}  # otherwise what the file's format says


def sample(op: Op, fmt: str, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Arguments of `op` for a file of format "int4" or "nvfp4", laid out as on this type of device."""
    act = next((name for prefix, name in ACTS.items() if op.name.startswith(prefix)), fmt)
    layout = _layout(fmt, act, device)
    spec = _spec(op, fmt, act, layout)
    shapes = _shapes(fmt, act, N // 2 if "_glu_" in op.name else N, dtype, layout)
    if op.name == "attention":
        heads = ((1, N // HEAD, M, HEAD), dtype)
        shapes |= {"q": heads, "k": heads, "v": heads}
    tensors = [torch.zeros(shape, dtype=kind, device=device)
               for shape, kind in (shapes[p.name] for p in op.parameters if p.name != "spec")]
    return (*tensors, spec) if op.spec_class else tuple(tensors)


def _layout(fmt: str, act: str, device: str) -> str:
    """How compiled kernels for 4-bit activations want them; where none runs that multiplies such, all is in rows."""
    if device != "cuda" or act != fmt or forced_backend() not in (None, "cuda"):
        return ROW
    here = torch.device(device)
    refused = gpu.refuses_gpu(gpu.capability_of(here)) or (gpu.refuses_nvfp4(here) if fmt == "nvfp4" else None)
    return ROW if refused else MMA


def _spec(op: Op, fmt: str, act: str, layout: str) -> ActSpec | AttentionSpec | LinearSpec:
    if op.spec_class is AttentionSpec:
        return AttentionSpec()
    group = GROUPS.get(act, 0)
    if op.spec_class is ActSpec:
        return ActSpec(act, group, norm="layer" if op.name.startswith("norm_") else "none", layout=layout)
    taken = ActSpec(act, group, layout=layout)
    following = taken if "quantize" in op.name else None
    activation = "none" if following is None else "gelu_tanh"
    return LinearSpec(fmt, GROUPS[fmt], K, taken, layout, row_scales=act == "int8", activation=activation,
                      next=following, head_dim=HEAD)


def _shapes(fmt: str, act: str, k_next: int, dtype: torch.dtype, layout: str
            ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Parameter name → shape and dtype; an op's parameters are named alike everywhere."""
    fp32 = torch.float32
    scale, groups = torch.float8_e4m3fn if fmt == "nvfp4" else dtype, group_count(K, GROUPS[fmt])
    of_x, of_w = (mma_scales(fmt, rows, K) if layout == MMA else (rows, groups) for rows in (M, N))
    qx, sx = {"none": (((M, K), dtype), ((0,), fp32)), "int8": (((M, K), torch.int8), ((M,), fp32))}.get(
        act, (((M, K // 2), torch.uint8), (of_x, scale)))
    return {
        "x": ((M, K), dtype), "norm_weight": ((K,), dtype), "scale": ((1, K), dtype), "shift": ((1, K), dtype),
        "inv_smooth": ((K,), fp32), "down": ((R, K), dtype), "qx": qx, "sx": sx,
        "qw": ((N, K // 2), torch.uint8), "sw": (of_w, scale),
        "aux": ((N * ((act == "int8") + (fmt == "nvfp4")),), fp32), "h": ((M, R), fp32),
        "up": ((N, R), dtype), "bias": ((N,), dtype),
        "next_inv_smooth": ((k_next,), fp32), "next_down": ((R, k_next), dtype),
        "q_norm": ((HEAD,), dtype), "k_norm": ((HEAD,), dtype), "rotary": ((M, HEAD // 2, 2), fp32),
        "gate": ((1, N), dtype), "residual": ((M, N), dtype)}
