"""LoRAs that were converted for Nunchaku's FLUX.1: q, k, v as one, and 16-bit factors in the order in which its kernels
read them.

    down: a = r%16, b = c%16      up: a = c%16, b = r%16      (r: rank, c: input or output channel)
    element of the 16×16 tile: ((((a%8)·4 + b%8//2)·2 + a//8)·2 + b//8)·2 + b%2;    tiles by c//16, then r//16

Ranks are padded to 16 with zeros. Modulation layers are not packed, but their outputs are interleaved: row j = c·S + s of
the file is row s·(N/S) + c of diffusers' (S = 6, or 3 in single blocks).
"""
from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .modules import joined

_NAMES = {  # diffusers' modules; those of q, k, v stand one after the other
    "qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.to_added_qkv", "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
    "norm1.linear": "norm1.linear", "norm1_context.linear": "norm1_context.linear",
}
_SINGLE = {"qkv_proj": "attn.to_qkv", "mlp_fc1": "proj_mlp", "norm.linear": "norm.linear"}
_KEY = re.compile(r"(?P<block>(?:single_)?transformer_blocks\.\d+)\.(?P<name>.+)\.lora_(?P<half>down|up)")


def is_packed(state: Mapping[str, Tensor]) -> bool:
    return any(_KEY.fullmatch(name) for name in state)


def unpacked(state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], bool]:
    """(the state with such keys in PEFT's names, whether there were any)."""
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _KEY.fullmatch(name)
        if found is None:
            rest[name] = tensor
        else:
            pairs.setdefault((found["block"], found["name"]), {})[found["half"]] = tensor
    if not pairs:
        return state, False
    for block in dict.fromkeys(block for block, _ in pairs):
        rest |= _block(block, {name: halves for (one, name), halves in pairs.items() if one == block})
    return rest, True


def _block(block: str, found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    single = block.startswith("single_")
    out: dict[str, Tensor] = {}
    parts = [_factors(name, found.pop(name)) for name in ("out_proj", "mlp_fc2") if single and name in found]
    if len(parts) == 2 and all(len(part) == 2 for part in parts):  # one linear over attention and MLP
        out |= _named(f"{block}.proj_out", dict(zip(("lora_A", "lora_B"), joined([
            (part["lora_A"], part["lora_B"]) for part in parts]), strict=True)))
    elif parts:
        out |= {key: tensor for part in parts for key, tensor in _named(f"{block}.proj_out", part).items()}
    for name, halves in found.items():
        out |= _named(f"{block}.{(_SINGLE if single else _NAMES).get(name, name)}", _factors(name, halves))
    return out


def _named(module: str, halves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"transformer.{module}.{half}.weight": tensor for half, tensor in halves.items()}


def _factors(name: str, halves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """lora_A (R,K) and lora_B (N,R), without the ranks that are padding."""
    if name.endswith(".linear"):
        spread = 6 if name.startswith("norm1") else 3
        out = {"lora_A": halves.get("down"), "lora_B": halves.get("up")}
        if out["lora_B"] is not None:
            up = out["lora_B"]
            out["lora_B"] = up.view(-1, spread, up.shape[1]).transpose(0, 1).reshape(up.shape)
    else:
        out = {"lora_A": unpack(halves["down"], True).T if "down" in halves else None,
               "lora_B": unpack(halves["up"], False) if "up" in halves else None}
    out = {half: tensor for half, tensor in out.items() if tensor is not None}
    if len(out) == 2:
        used = (out["lora_A"] != 0).any(1) | (out["lora_B"] != 0).any(0)
        out = {"lora_A": out["lora_A"][used].contiguous(), "lora_B": out["lora_B"][:, used].contiguous()}
    return out


def unpack(packed: Tensor, down: bool) -> Tensor:
    """(C,R) in the kernels' order → (C,R) in rows."""
    channels, ranks = packed.shape
    tiles = packed.reshape(channels // 16, ranks // 16, 8, 4, 2, 2, 2)  # c, r; a%8, b%8//2, a//8, b//8, b%2
    tiles = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(channels // 16, ranks // 16, 16, 16)  # c, r; a, b
    if down:  # a is the rank
        tiles = tiles.transpose(2, 3)
    return tiles.permute(0, 2, 1, 3).reshape(channels, ranks)


def pack(plain: Tensor, down: bool) -> Tensor:
    """The inverse of `unpack`."""
    channels, ranks = plain.shape
    tiles = plain.reshape(channels // 16, 16, ranks // 16, 16).permute(0, 2, 1, 3)
    if down:
        tiles = tiles.transpose(2, 3)
    tiles = tiles.reshape(channels // 16, ranks // 16, 2, 8, 2, 4, 2).permute(0, 1, 3, 5, 2, 4, 6)
    return tiles.reshape(channels, ranks)


def interleave(up: Tensor, spread: int) -> Tensor:
    """Rows of a modulation layer in the file's order."""
    return up.view(spread, -1, up.shape[1]).transpose(0, 1).reshape(up.shape)
