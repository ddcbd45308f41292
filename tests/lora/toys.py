"""Toy LoRAs: random factors in PEFT's names, for any modules of a model."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def normal(*shape: int, seed: int, size: float = 0.1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(torch.bfloat16)


def base_of(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return getattr(module, "base_layer", module)


def quantized(model: nn.Module) -> list[str]:
    """Names of the quantized linears and convolutions, as they are without adapters."""
    found = [name for name, module in model.named_modules() if getattr(module, "is_nunchaku_quantized", False)]
    return [name.removesuffix(".base_layer") for name in found if ".parts." not in name]


def dense(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def toy(model: nn.Module, names: Iterable[str], rank: int = 4, seed: int = 0, prefix: str = "") -> State:
    """A LoRA of one rank on all of these modules."""
    state: State = {}
    for i, name in enumerate(names):
        shape = base_of(model, name).weight.shape
        state[f"{prefix}{name}.lora_A.weight"] = normal(rank, *shape[1:], seed=1000 * seed + 2 * i)
        state[f"{prefix}{name}.lora_B.weight"] = normal(shape[0], rank, *(1 for _ in shape[2:]),
                                                       seed=1000 * seed + 2 * i + 1)
    return state
