"""The linear ops with all their endings, by the Triton kernels, and which numbers those take."""
from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ... import ops
from ...ops.registry import Op, forced_backend
from ...ops.spec import ActSpec, LinearSpec
from . import device as gpu

SMALLEST = {"int4": 64, "uint4": 64, "nvfp4": 16}  # group that a tensor core sums at a time
LARGEST_GROUP = 128
WIDEST_HEAD = 128
WIDEST_NEXT = 64  # inputs of a group of the next linear's
Refusal = Callable[..., "str | None"]
_signed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # scales of weights → (their version, whether any has a sign)


def expands(spec: LinearSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linear_w4a8 runs here on a 4-bit weight, which it expands in every call, and rows of this dtype."""
    if device.type != gpu.DEVICE or forced_backend() not in (None, "triton"):
        return False
    refused = gpu.refuses_device(torch.empty(0, device=device)) or gpu.refuses_dtype(dtype)
    return (refused or _refuses_numbers(spec, device)) is None


# ------------------------------------------------------------------------------------------------------ what is refused
def _refuses(qx: Tensor, *args: Tensor | LinearSpec) -> str | None:
    return (gpu.refuses_device(qx) or gpu.refuses_dtype(args[5].dtype) or _refuses_numbers(args[-1], qx.device)
            or gpu.refuses_gradient(qx) or _refuses_signs(args[2], args[-1]))


def _refuses_signs(scales: Tensor, spec: LinearSpec) -> str | None:
    """Looked at once for each weight, as the host waits for the GPU."""
    if spec.act.format != "nvfp4":
        return None
    version = 0 if scales.is_inference() else scales._version
    if _signed.get(scales, (None,))[0] != version:
        _signed[scales] = version, bool((scales.view(torch.uint8) > 0x7F).any())
    return "its scales have signs, which the instruction for NVFP4 does not look at" if _signed[scales][1] else None


def _refuses_numbers(spec: LinearSpec, device: torch.device) -> str | None:
    if spec.k % 2 and spec.weight != "int8":
        return f"it takes an even number of inputs, not {spec.k}"
    if not spec.k:
        return "it takes no linear without inputs"
    act = spec.act.format
    if act == "int8":
        return _refuses_expanding(spec)
    if act == "none":
        return _refuses_group(spec.weight, spec.group, 16)
    return _refuses_codes(spec, device)


def _refuses_group(name: str, group: int, smallest: int) -> str | None:
    if name == "int8":
        return "it multiplies INT8 weights by INT8 activations only"
    if group & (group - 1) or not smallest <= group <= LARGEST_GROUP:
        return f"it takes {name} in groups of {smallest}, {2 * smallest} … {LARGEST_GROUP}, not {group}"
    return None


def _refuses_expanding(spec: LinearSpec) -> str | None:
    if spec.weight == "int8":
        return None
    if spec.weight not in ("int4", "nvfp4") or not spec.row_scales:
        return (f"it multiplies INT8 weights, and expands to them int4 and nvfp4 ones whose scales are given, not "
                f"{spec.weight} ones")
    return _refuses_group(spec.weight, spec.group, 16)


def _refuses_codes(spec: LinearSpec, device: torch.device) -> str | None:
    act, weight = spec.act.format, spec.weight
    if weight != ("int4" if act == "uint4" else act) or spec.group != spec.act.group:
        return (f"it multiplies alike codes in alike groups, not {act} in groups of {spec.act.group} by {weight} in "
                f"groups of {spec.group}")
    if act != "nvfp4":
        return _refuses_group(act, spec.group, SMALLEST[act])
    if gpu.capability_of(device) not in gpu.NVFP4:
        return "a GPU of compute capability {}.{} has no instruction for NVFP4".format(*gpu.capability_of(device))
    return None if spec.group == SMALLEST[act] else f"it takes nvfp4 in groups of {SMALLEST[act]}, not {spec.group}"


def _refuses_heads(*args: Tensor | LinearSpec) -> str | None:
    dim = args[-1].head_dim
    if dim & (dim - 1) or dim > WIDEST_HEAD:
        return f"it takes heads of 2, 4 … {WIDEST_HEAD}, not {dim}"
    return _refuses(*args)


def _refuses_next(parts: int) -> Refusal:
    """Of an ending that makes one column of the next input from so many of its own."""
    def refuses(*args: Tensor | LinearSpec) -> str | None:
        return _refuses(*args) or _refuses_next_act(args[-1].next, args[2].shape[0] // parts)

    return refuses


def _refuses_next_act(spec: ActSpec, width: int) -> str | None:
    if spec.format in ("int8", "none"):
        return None
    if width % 2:
        return f"it packs codes of an even number of columns, not {width}"
    if spec.group & (spec.group - 1) or not 16 <= spec.group <= WIDEST_NEXT:
        return f"it quantizes in groups of 16, 32 … {WIDEST_NEXT}, not {spec.group}"
    return None


# --------------------------------------------------------------------------------------------------------- registration
def _register(op: Op, suffix: str, refuses: Refusal) -> None:
    def run(*args: Tensor | LinearSpec) -> object:
        return gpu.kernels("linear").linear(suffix, args)

    run.__signature__ = inspect.signature(op.reference)
    op.backend("triton", refuses)(run)


_ENDINGS: dict[str, Refusal] = {"": _refuses, "_gate_residual": _refuses, "_qkv_rope": _refuses_heads,
                                "_gelu_quantize": _refuses_next(1), "_glu_quantize": _refuses_next(2)}
for _family in ("linear_w4a4", "linear_w4a8", "linear_w4a16"):
    for _suffix, _why_not in _ENDINGS.items():
        _register(ops.OPS[_family + _suffix], _suffix, _why_not)
