"""Real architectures with random weights, in 16 bit, quantized, or converted by somebody else, within seconds.

Of each kind of block `distinct` are drawn and really quantized; the others are copies of these, in memory of their own,
since neither time nor memory depends on what the weights are. `share`: not even that, the others are the same tensors,
for a model that does not fit: each block is still computed, but what it holds is no more than one of each kind.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.build import empty_model
from ..engine import Engine, jobs_of
from ..models.discover import blocks_of
from ..models.pattern import pattern_of
from ..models.plan import plan
from ..quantize import Run, context_of
from ..recipes import Recipe
from ..swap import replace_module

BF16 = torch.bfloat16
Told = Callable[[str], None]  # hears what is being made
LARGEST = (10**6, 2**42)  # tensors, bytes: of a config that is not a stranger's


def silent(_: str) -> None:
    """Nobody listens."""


def meta_model(config: dict[str, Any], source: str) -> nn.Module:
    """The model of a config (with `_class_name`), its parameters in 16 bit without data."""
    return empty_model(config, *LARGEST, source).to(BF16)


class Sources:
    """The name, of a module or tensor, that a name is a copy of. With `distinct` = 0 there are no copies."""

    def __init__(self, model: nn.Module, distinct: int) -> None:
        kinds: dict[tuple, list[str]] = {}
        self.of_block: dict[str, str] = {}
        for name, block in blocks_of(model, pattern_of(model)).items():
            shapes = tuple(tensor.shape for tensor in block.parameters())
            alike = kinds.setdefault((type(block), shapes), [])
            alike.append(name)
            self.of_block[name] = alike[(len(alike) - 1) % distinct] if distinct else name

    def __call__(self, name: str) -> str:
        block = name
        while block and block not in self.of_block:
            block = block.rpartition(".")[0]
        return self.of_block[block] + name.removeprefix(block) if block else name


def random_tensor(name: str, shape: torch.Size, device: str = "cpu") -> Tensor:
    """Ones for the weight of a norm, else normal, so that linears and convolutions keep the size of their input."""
    path, _, leaf = name.rpartition(".")
    if len(shape) == 1 and leaf == "weight" and "norm" in path.rpartition(".")[2]:
        return torch.ones(shape, dtype=BF16, device=device)
    fan = shape[1:].numel() if len(shape) > 1 else shape.numel()
    return torch.empty(shape, dtype=BF16, device=device).normal_(std=max(fan, 1)**-0.5)


def fill(model: nn.Module, names: Iterable[str], device: str) -> None:
    """Random values for these tensors of a model on the meta device."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: random_tensor(name, shapes[name], device) for name in names}, strict=False,
                          assign=True)


@torch.no_grad()
def random_model(model: nn.Module, distinct: int, device: str = "cpu", share: bool = False) -> nn.Module:
    """In 16 bit, from a model on the meta device, which becomes it."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    source_of = Sources(model, distinct)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(shapes, key=lambda name: source_of(name) != name):  # sources come first
        source = source_of(name)
        if source == name:
            state[name] = random_tensor(name, shapes[name], device)
        else:
            state[name] = state[source] if share else state[source].clone()
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def random_quantized(model: nn.Module, recipe: Recipe, mode: str, device: str = "cpu", told: Told = silent,
                     rules: Mapping[str, str] | None = None) -> nn.Module:
    """Quantized, from a model on the meta device, which becomes it; its 16-bit weights are never all there."""
    torch.manual_seed(0)
    planned, source_of = plan(model, recipe.kind, rules), Sources(model, 1)
    run = Run(model, Engine(recipe, context_of(recipe, BF16)), planned, jobs_of(planned), BF16, mode=mode)
    chosen = {name for job in run.jobs for name in job.names}
    owner = {name: name.rpartition(".")[0] for name in model.state_dict()}
    fill(model, [name for name, module in owner.items() if module not in chosen], device)
    for block, jobs in run.blocks.items():
        names = [name for job in jobs for name in job.names]
        if source_of(block) == block:
            told(f"quantizing {block}")
            fill(model, [name for name, module in owner.items() if module in names], device)
            run.quantize_block(block, {})
        else:
            run.modules |= {name: copy.deepcopy(run.modules[source_of(name)]) for name in names}
    run.finish(0, time.monotonic())
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def random_converted(model: nn.Module, convert: Callable[[nn.Module], nn.Module], distinct: int, device: str = "cpu",
                     told: Told = silent) -> nn.Module:
    """What `convert` makes of every block, from a model on the meta device, which becomes it; block by block."""
    torch.manual_seed(0)
    source_of = Sources(model, distinct)
    blocks = source_of.of_block
    inside = {name for name in model.state_dict() if any(name.startswith(f"{block}.") for block in blocks)}
    fill(model, [name for name in model.state_dict() if name not in inside], device)
    for block, source in blocks.items():
        if block == source:
            told(f"converting {block}")
            fill(model, [name for name in sorted(inside) if name.startswith(f"{block}.")], device)
            made = convert(model.get_submodule(block).to(device).eval().requires_grad_(False))
        else:
            made = copy.deepcopy(model.get_submodule(source))
        replace_module(model, block, made)
    return model.to(device).eval().requires_grad_(False)
