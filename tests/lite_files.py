"""nunchaku_lite folders made by hand: each tensor packed by a formula for the place of one element."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


def _axes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")


def _placed(index: Tensor, values: Tensor) -> Tensor:
    out = torch.empty(values.numel(), dtype=values.dtype)
    assert torch.equal(index.flatten().sort().values, torch.arange(values.numel()))
    out[index.flatten()] = values.flatten()
    return out


def weight(codes: Tensor) -> Tensor:
    """qweight of codes 0 … 15 (N, K)."""
    (n, k), count = _axes(*codes.shape), codes.shape[1]
    word = (n // 128) * (count // 64) + k // 64
    for digit, base in (((n % 128) // 16, 8), (n % 8, 8), ((k % 32) // 8, 4), ((n % 16) // 8, 2), ((k % 64) // 32, 2)):
        word = word * base + digit
    nibbles = _placed(8 * word + k % 8, codes.to(torch.uint8))
    return (nibbles[0::2] | nibbles[1::2] << 4).view(torch.int8).reshape(codes.shape[0], -1)


def scales(values: Tensor) -> Tensor:
    """wscales (G, N) of 16 bit (N, G)."""
    (n, g), groups = _axes(*values.shape), values.shape[1]
    r = n % 128
    index = ((((n // 128 * groups + g) * 8 + r // 16) * 4 + (r % 8) // 2) * 2 + (r % 16) // 8) * 2 + r % 2
    return _placed(index, values).reshape(groups, -1)


def vector(values: Tensor) -> Tensor:
    return scales(values[:, None]).flatten()


def micro_scales(values: Tensor) -> Tensor:
    """wscales (G, N) of e4m3 (N, G)."""
    (n, g), groups = _axes(*values.shape), values.shape[1]
    r = n % 128
    index = ((((n // 128 * (groups // 4) + g // 4) * 8 + r % 8) * 4 + (r % 32) // 8) * 4 + r // 32) * 4 + g % 4
    return _placed(index, values.view(torch.uint8)).view(torch.float8_e4m3fn).reshape(groups, -1)


def branch(values: Tensor, down: bool) -> Tensor:
    """proj_down (K, R) of (R, K); proj_up (N, R) of (N, R)."""
    by_channel = values.T if down else values
    (c, r), ranks = _axes(*by_channel.shape), by_channel.shape[1]
    a, b = (r % 16, c % 16) if down else (c % 16, r % 16)
    index = c // 16 * (ranks // 16) + r // 16
    for digit, base in ((a % 8, 8), ((b % 8) // 2, 4), (a // 8, 2), (b // 8, 2), (b % 2, 2)):
        index = index * base + digit
    return _placed(index, by_channel.contiguous()).reshape(by_channel.shape)


def awq_weight(codes: Tensor) -> Tensor:
    """qweight int32 (N/4, K/2) of codes 0 … 15 (N, K)."""
    (n, k), count = _axes(*codes.shape), codes.shape[1]
    column = k // 64 * 64 + n % 4 * 16 + (k % 64) // 32 * 8 + k % 8
    nibbles = _placed(((n // 4) * count + column) * 4 + (k % 32) // 8, codes.to(torch.int32)).view(-1, 4)
    words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
    return words.to(torch.int16).view(torch.int32).reshape(codes.shape[0] // 4, -1)


@dataclass
class Handmade:
    """tensors: as the file holds them, by leaf; weight (N, K) fp32: what they stand for, the branch included."""

    tensors: dict[str, Tensor]
    weight: Tensor
    bias: Tensor


def _normal(*shape: int) -> Tensor:
    return (0.1 * torch.randn(shape)).bfloat16()


def w4a4(n: int, k: int, fmt: str, rank: int) -> Handmade:
    codes = torch.randint(0, 16, (n, k))
    smooth, down, up, bias = torch.rand(k).add(0.5).bfloat16(), _normal(rank, k), _normal(n, rank), _normal(n)
    tensors = {"qweight": weight(codes), "smooth_factor": vector(smooth), "proj_down": branch(down, True),
               "proj_up": branch(up, False), "bias": vector(bias)}
    if fmt == "int4":
        scale = torch.rand(n, k // 64).add(0.1).mul(0.01).bfloat16()
        tensors["wscales"] = scales(scale)
        values = torch.where(codes > 7, codes - 16, codes) * scale.float().repeat_interleave(64, 1)
    else:
        scale = torch.rand(n, k // 16).add(0.1).to(torch.float8_e4m3fn)
        channels, common = torch.rand(n).add(0.5).mul(0.1).bfloat16(), torch.tensor([0.37]).bfloat16()
        tensors |= {"wscales": micro_scales(scale), "wcscales": vector(channels), "wtscale": common}
        values = E2M1[codes % 8] * torch.where(codes > 7, -1, 1) * scale.float().repeat_interleave(16, 1)
        values = values * (channels.float() * common.float())[:, None]
    return Handmade(tensors, values / smooth.float() + up.float() @ down.float(), bias)


def w4a16(n: int, k: int) -> Handmade:
    codes, bias = torch.randint(0, 16, (n, k)), _normal(n)
    scale, zero = torch.rand(n, k // 64).add(0.1).mul(0.01).bfloat16(), _normal(n, k // 64)
    tensors = {"qweight": awq_weight(codes), "wscales": scale.T.contiguous(), "wzeros": zero.T.contiguous(),
               "bias": bias}
    values = codes * scale.float().repeat_interleave(64, 1) + zero.float().repeat_interleave(64, 1)
    return Handmade(tensors, values, bias)


def section(targets: list[str], fmt: str, rank: int = 16) -> dict[str, Any]:
    return {"precision": fmt, "group_size": {"int4": 64, "nvfp4": 16}[fmt], "rank": rank, "targets": targets}


def awq_section(targets: list[str]) -> dict[str, Any]:
    return {"precision": "int4", "group_size": 64, "targets": targets}


def write_by_hand(model: nn.Module, folder: Path, linears: Mapping[str, Handmade], **quantization: Any) -> Path:
    """The dense model with some of its linears packed."""
    model.save_pretrained(folder)
    state = load_file(folder / FILE)
    for name, made in linears.items():
        for leaf in ("weight", "bias"):
            for owner in (name, name.rpartition(".linears.")[0]):
                state.pop(f"{owner}.{leaf}", None)
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in made.tensors.items()}
    save_file(state, folder / FILE, {"format": "pt"})
    edit_config(folder, lambda config: config.update(
        quantization_config={"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", **quantization}))
    return folder


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Any) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, {"format": "pt"})


def shard(folder: Path, count: int = 3) -> None:
    """Cut the file into `count`, neighbours never together: what belongs together comes from several files."""
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    places = {key: names[i % count] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key, place in places.items() if place == name}, folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
