"""Which numbers the kernels multiply, how their scales lie on the device, and why they do not take others."""
from __future__ import annotations

import torch
from torch import Tensor

from ...layout import Layout
from ...ops.checks import short
from ...ops.registry import forced_backend
from ...ops.spec import ActSpec, LinearSpec
from . import device as gpu

CODES = {"int4": 1, "uint4": 2, "nvfp4": 3, "int8": 4}
GROUP = 64  # inputs that share an INT4 scale, and that a warp quantizes and an instruction multiplies at a time
CHANNELS = 16  # output channels come in multiples of it
GROUPS = {"int4": GROUP, "uint4": GROUP, "nvfp4": 16, "int8": 0}
EXPANDED = {"int4": 32, "nvfp4": 16}  # to INT8; weights that share a scale at least
LONGEST = 2**16 * GROUP // 2  # inputs whose steps a kernel counts in 16 bits
_CHANNELS = Layout("(N n:8 t:4 e:2) (G) -> G N t n e")
_WORDS = Layout("(N n:64) (G g:4) -> G N n g")  # NVFP4: of a row, the four scales that an instruction takes


# -------------------------------------------------------------------------------------------------------------- packing
def packed_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's scales (N,G) as kernels read them: INT4's, in the type of the rows, (G, rows padded to 64); NVFP4's
    (G/4, rows padded to 64, 4)."""
    if scales.dtype == torch.float8_e4m3fn:
        padded = _WORDS.pad(scales.view(torch.uint8))
        return _WORDS.pack(padded).view(-1, padded.shape[0], 4).view(scales.dtype)
    padded = _CHANNELS.pad(scales.to(dtype))
    return _CHANNELS.pack(padded).view(padded.shape[1], padded.shape[0])


def why_not_packed(spec: LinearSpec, n: int, scales: Tensor, dtype: torch.dtype) -> str | None:
    """Why a weight's scales stay as the file holds them, on this device and for activations of this dtype."""
    if scales.device.type == gpu.DEVICE and not gpu.asked_for(scales.device):
        return f"the backend '{forced_backend()}' is asked for"
    refused = gpu.refuses_device(scales) or gpu.refuses_dtype(dtype, scales.device)
    return refused or refuses_weight(spec, n, scales.device) or _refuses_scales(scales, dtype)


def _refuses_scales(scales: Tensor, dtype: torch.dtype) -> str | None:
    values = scales.float()
    if scales.dtype == torch.float8_e4m3fn:
        return "its scales have signs, which the instruction for NVFP4 does not look at" if (values < 0).any() else None
    return None if torch.equal(scales.to(dtype).float(), values) else f"its scales are no {short(dtype)} numbers"


def expands(spec: LinearSpec, n: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linear_w4a8 runs here on a 4-bit weight, which it expands in every call, and rows of this dtype."""
    if not gpu.asked_for(device):
        return False
    refused = gpu.refuses_device(torch.empty(0, device=device)) or gpu.refuses_dtype(dtype, device)
    return (refused or refuses_weight(spec, n, device)) is None


# ------------------------------------------------------------------------------------------------------ what is refused
def refuses_act(spec: ActSpec, k: int, device: torch.device) -> str | None:
    if spec.format not in CODES or spec.group != GROUPS[spec.format]:
        return (f"its activations are INT4 in groups of {GROUP}, NVFP4 in groups of {GROUPS['nvfp4']} or INT8, "
                f"not {spec.format} in groups of {spec.group}")
    if spec.format == "nvfp4" and (refused := gpu.refuses_nvfp4(device)):
        return refused
    if k >= LONGEST:
        return f"it takes fewer than {LONGEST} inputs, not {k}"
    return None if k and k % GROUP == 0 else f"it takes inputs in whole groups of {GROUP}, not {k}"


def refuses_weight(spec: LinearSpec, n: int, device: torch.device) -> str | None:
    if n % CHANNELS:
        return f"it takes output channels in multiples of {CHANNELS}, not {n}"
    if spec.act.format == "int8":
        return _refuses_expanding(spec) or gpu.refuses_int8(device) or refuses_act(spec.act, spec.k, device)
    wanted = "int4" if spec.act.format == "uint4" else spec.act.format
    if spec.weight != wanted or spec.group != GROUPS[wanted]:
        return (f"with {spec.act.format} activations its weights are {wanted} in groups of {GROUPS[wanted]}, "
                f"not {spec.weight} in groups of {spec.group}")
    return refuses_act(spec.act, spec.k, device)


def _refuses_expanding(spec: LinearSpec) -> str | None:
    """Of a weight that is not INT8 yet."""
    if spec.weight == "int8":
        return None
    if spec.weight not in EXPANDED or not spec.row_scales:
        return (f"it multiplies INT8 weights, and expands to them {' and '.join(EXPANDED)} ones whose scales are "
                f"given, not {spec.weight} ones")
    smallest = EXPANDED[spec.weight]
    if spec.group % smallest:
        return f"it expands {spec.weight} weights in groups that are multiples of {smallest}, not {spec.group}"
    return None
