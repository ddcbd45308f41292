"""Files as Nunchaku's own tools write them, with random content, and what each linear of them stands for.

Written from the description of the format alone: names, layouts and conventions stand here a second time."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoint import peer_layout as at

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LONG = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "lora_down": "proj_down", "lora_up": "proj_up"}


def whole(size: int, tile: int) -> int:
    return (size + tile - 1) // tile * tile


def grown(x: Tensor, rows: int, columns: int, fill: float) -> Tensor:
    out = torch.full((rows, columns), float(fill)).to(x.dtype)
    out[:x.shape[0], :x.shape[1]] = x
    return out


@dataclass
class Truth:
    """A linear of the network: y = x · weightᵀ + bias, fp32."""

    weight: Tensor
    bias: Tensor


@dataclass
class PeerFile:
    """The tensors of a file as it grows, and the linears and other tensors that diffusers' model has."""

    fmt: str
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    long_names: bool = False
    zero_biases: bool = True  # where a linear has none; False: as Python's models of the peer want it, which have none
    always_channels: bool = False  # NVFP4: a second scale for every channel, not one for a linear
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def put(self, name: str, leaf: str, tensor: Tensor) -> None:
        leaf = LONG.get(leaf, leaf) if self.long_names else leaf
        self.tensors[f"{name}.{leaf}"] = tensor.contiguous()

    # ------------------------------------------------------------------------------------------------------- W4A4
    def w4a4(self, name: str, n: int, k: int, gelu: bool = False, bias: bool = True, joined: bool = False,
             fused: bool = False) -> Truth:
        rows, columns = whole(n, 128), whole(k, 128)
        codes = torch.randint(0, 16, (n, k), generator=self.generator)
        packed = at.nibbles(at.scattered(grown(codes, rows, columns, 0), at.code_places(rows, columns)))
        self.put(name, "qweight", packed.view(torch.int8).reshape(rows, columns // 2))
        residual = self._scaled(name, codes, rows, columns, joined)
        original = (0.5 + torch.rand(k, generator=self.generator)).to(self.dtype)
        smooth = torch.ones_like(original) if fused else original
        self.put(name, "smooth", self._vector(smooth, columns))
        self.put(name, "smooth_orig", self._vector(original, columns))
        down, up = self.normal(self.rank, k, std=k**-0.5), self.normal(n, self.rank, std=0.1)
        self.put(name, "lora_down", at.scattered(grown(down, self.rank, columns, 0), at.down_places(
            self.rank, columns)).reshape(columns, self.rank))
        self.put(name, "lora_up", at.scattered(grown(up, rows, self.rank, 0), at.up_places(
            rows, self.rank)).reshape(rows, self.rank))
        stored = self.normal(n, std=0.1) if bias else torch.zeros(n, dtype=self.dtype)
        if bias or self.zero_biases:
            self.put(name, "bias", self._vector(stored, rows))
        divided = residual / smooth.float()
        true_bias = stored.float() + (SHIFT * divided.sum(1) if gelu and self.fmt == "int4" else 0)
        return Truth(divided + up.float() @ down.float(), true_bias)

    def _vector(self, vector: Tensor, size: int) -> Tensor:
        return at.scattered(grown(vector[:, None], size, 1, 1), at.scale_places(size, 1))

    def _scaled(self, name: str, codes: Tensor, rows: int, columns: int, joined: bool) -> Tensor:
        """Write scales for the codes; fp32 (n, k) of what they stand for."""
        n, k = codes.shape
        size = 64 if self.fmt == "int4" else 16
        groups = columns // size
        scales = 0.02 * (0.5 + torch.rand(n, -(-k // size), generator=self.generator))
        if self.fmt == "int4":
            scales = scales.to(self.dtype)
            self.put(name, "wscales", at.scattered(grown(scales, rows, groups, 1), at.scale_places(
                rows, groups)).reshape(groups, rows))
            return torch.where(codes > 7, codes - 16, codes) * scales.float().repeat_interleave(size, 1)[:, :k]
        scales = (50 * scales).to(torch.float8_e4m3fn)
        self.put(name, "wscales", at.scattered(grown(scales.float(), rows, groups, 1), at.micro_scale_places(
            rows, groups)).to(torch.float8_e4m3fn).reshape(groups, rows))
        if joined or self.always_channels:  # every number of a joined linear is one for each channel
            channel = (0.02 * (0.5 + torch.rand(n, generator=self.generator))).to(self.dtype)
            self.put(name, "wcscales", self._vector(channel, rows))
        else:
            channel = torch.tensor([0.023]).to(self.dtype)
            self.put(name, "wtscale", channel)
        return E2M1[codes] * scales.float().repeat_interleave(size, 1)[:, :k] * channel.float()[:, None]

    # ------------------------------------------------------------------------------------------------------ W4A16
    def modulation(self, name: str, n: int, k: int, spread: int) -> Truth:
        """Symmetric codes with 7 added; rows by channels; 1 added to the bias of scales."""
        codes = torch.randint(0, 15, (n, k), generator=self.generator)
        scales = (0.02 * (0.5 + torch.rand(n, k // 64, generator=self.generator))).to(self.dtype)
        bias, zeros = self.normal(n, std=0.1), -7 * scales
        plain = codes * scales.float().repeat_interleave(64, 1) + zeros.float().repeat_interleave(64, 1)
        order = torch.tensor([(j % spread) * (n // spread) + j // spread for j in range(n)])  # of the file's rows
        packed = at.nibbles(at.scattered(codes[order], at.awq_places(n, k)))
        self.put(name, "qweight", packed.view(torch.int32).reshape(n // 4, k // 2))
        self.put(name, "wscales", grown(scales[order].T, whole(k // 64, 16), n, 0))
        self.put(name, "wzeros", grown(zeros[order].T, whole(k // 64, 16), n, 0))
        baked = bias[order].clone()
        for kind in {1, spread - 2}:
            baked[kind::spread] += 1
        self.put(name, "bias", baked)
        read = baked.float()
        for kind in {1, spread - 2}:
            read[kind::spread] -= 1
        true = torch.empty(n)
        true[order] = read
        return Truth(plain, true)

    def text_linear(self, name: str, n: int, k: int) -> Truth:
        codes = torch.randint(0, 16, (n, k), generator=self.generator)
        scales = (0.02 * (0.5 + torch.rand(n, k // 128, generator=self.generator))).to(self.dtype)
        zeros = self.normal(n, k // 128, std=0.1)
        packed = at.nibbles(at.scattered(codes, at.awq_places(n, k)))
        self.put(name, "qweight", packed.view(torch.int16).reshape(n // 4, k))
        self.put(name, "scales", grown(scales.T, whole(k // 128, 8), n, 0))
        self.put(name, "scaled_zeros", grown(zeros.T, whole(k // 128, 8), n, 0))
        wide = [x.float().repeat_interleave(128, 1) for x in (scales, zeros)]
        return Truth(codes * wide[0] + wide[1], torch.zeros(n))

    # ------------------------------------------------------------------------------------------------------ the model
    def linear(self, module: str, truth: Truth, rows: slice = slice(None)) -> None:
        self.dense[f"{module}.weight"], self.dense[f"{module}.bias"] = truth.weight[rows], truth.bias[rows]

    def thirds(self, modules: tuple[str, ...], truth: Truth) -> None:
        size = truth.bias.shape[0] // len(modules)
        for i, module in enumerate(modules):
            self.linear(module, truth, slice(i * size, (i + 1) * size))

    def rest(self, model: nn.Module, renamed: dict[str, str]) -> None:
        """What the file holds in 16 bit: all the rest of `model`. renamed: diffusers' names → its"""
        held = set(self.dense)
        for name, tensor in model.state_dict().items():
            if name not in held and name.rpartition(".")[0] + ".weight" not in held:
                value = tensor.to(self.dtype)
                self.dense[name] = value.float()
                self.tensors[renamed.get(name, name)] = value.clone()

    def fill(self, model: nn.Module) -> nn.Module:
        """The model with what the file stands for, in fp32."""
        state = {name: self.dense[name].reshape(tensor.shape) for name, tensor in model.state_dict().items()}
        model.float().load_state_dict(state)
        return model.eval()

    def write(self, path: Path, config: dict, peer: str) -> Path:
        numbers = {"dtype": "int4" if self.fmt == "int4" else "fp4_e2m1_all",
                   "group_size": 64 if self.fmt == "int4" else 16}
        quantization = {"method": "svdquant", "weight": numbers, "activation": numbers, "rank": self.rank}
        save_file(self.tensors, path, {"config": json.dumps(config), "model_class": peer,
                                       "quantization_config": json.dumps(quantization)})
        return path
