"""LoRAs that were converted for Nunchaku's FLUX.1: q, k, v as one, and 16-bit factors in the order in which its kernels
read them, that of the branches of its checkpoints.

Ranks are padded to 16 with zeros. Modulation layers are not packed, but their outputs are interleaved: row j = c·S + s
of the file is row s·(N/S) + c of diffusers' (S = 6, or 3 in single blocks).
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.nunchaku.packing import unpack_down, unpack_up
from ..checkpoint.nunchaku.rows import apart
from ..errors import NunchakuError

_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_NAMES = {  # of double and single blocks, in names that the table of FLUX.1 has
    False: {"qkv_proj": "double_blocks.{}.img_attn.qkv", "qkv_proj_context": "double_blocks.{}.txt_attn.qkv",
            "out_proj": _DOUBLE + "attn.to_out.0", "out_proj_context": _DOUBLE + "attn.to_add_out",
            "mlp_fc1": _DOUBLE + "ff.net.0.proj", "mlp_fc2": _DOUBLE + "ff.net.2",
            "mlp_context_fc1": _DOUBLE + "ff_context.net.0.proj", "mlp_context_fc2": _DOUBLE + "ff_context.net.2",
            "norm1.linear": _DOUBLE + "norm1.linear", "norm1_context.linear": _DOUBLE + "norm1_context.linear"},
    True: {"qkv_proj": "single_blocks.{}.processor.qkv", "mlp_fc1": _SINGLE + "proj_mlp",
           "norm.linear": _SINGLE + "norm.linear"},
}
_OUTPUT = _SINGLE + "proj_out"  # one linear, which a file has as two: over attention, and over the MLP
_PARTS = ("out_proj", "mlp_fc2")
_KEY = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<number>\d+)\.(?P<name>.+)\.lora_(?P<half>down|up)")
Halves = dict[str, Tensor]


def unpacked(state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], bool]:
    """(the state with such keys in PEFT's names, whether there were any)."""
    found: dict[tuple[bool, str], dict[str, Halves]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            rest[key] = tensor
        else:
            block = found.setdefault((bool(match["single"]), match["number"]), {})
            block.setdefault(match["name"], {})[match["half"]] = _rows(key, tensor, match["name"], match["half"])
    for (single, number), modules in found.items():
        parts = [_whole(modules.pop(name)) for name in _PARTS if single and name in modules]
        both = len(parts) == 2 and all(len(part) == 2 for part in parts)
        for part in [joined(parts)] if both else parts:
            rest |= _named(_OUTPUT.format(number), part)
        for name, halves in modules.items():
            own = _NAMES[single].get(name, f"{'single_' * single}{_DOUBLE}{name}").format(number)
            rest |= _named(own, _whole(halves))
    return rest, bool(found)


def _rows(key: str, tensor: Tensor, name: str, half: str) -> Tensor:
    """down (R,K) or up (N,R)."""
    if tensor.ndim != 2:
        raise NunchakuError(f"{key}: expected a matrix, got {tuple(tensor.shape)}")
    if name.endswith(".linear"):
        spread = 6 if name.startswith("norm1") else 3
        return tensor if half == "down" else _in_order(key, tensor, spread)
    if any(size % 16 for size in tensor.shape):
        raise NunchakuError(f"{key}: expected (channels, ranks), both multiples of 16, got {tuple(tensor.shape)}")
    channels, ranks = tensor.shape
    return unpack_down(tensor, channels, ranks) if half == "down" else unpack_up(tensor, channels, ranks)


def _in_order(key: str, up: Tensor, spread: int) -> Tensor:
    if up.shape[0] % spread:
        raise NunchakuError(f"{key}: expected a multiple of {spread} rows, got {tuple(up.shape)}")
    return apart(up, spread)


def _whole(halves: Halves) -> Halves:
    """Without the ranks that are padding."""
    if len(halves) < 2 or halves["down"].shape[0] != halves["up"].shape[1]:
        return halves
    used = (halves["down"] != 0).any(1) | (halves["up"] != 0).any(0)
    return {"down": halves["down"][used], "up": halves["up"][:, used].contiguous()} if used.any() else halves


def _named(module: str, halves: Halves) -> dict[str, Tensor]:
    names = {"down": "lora_A", "up": "lora_B"}
    return {f"transformer.{module}.{names[half]}.weight": tensor for half, tensor in halves.items()}


def joined(parts: Sequence[Halves]) -> Halves:
    """Of a module from pairs that read one stretch of its inputs after another."""
    downs = torch.block_diag(*(part["down"] for part in parts))
    return {"down": downs, "up": torch.cat([part["up"] for part in parts], 1)}
