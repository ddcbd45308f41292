"""FLUX.1-dev's transformer with random weights on a GPU, in bf16 and quantized, within seconds.

Of each kind of block `distinct` are drawn, and really quantized; the others are copies of these, in memory of their
own. So a step reads as much as one of the real model, and the quantized model is the 4-bit version of the bf16 one.
"""
from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.flux_size import BF16, meta_model, random_tensor
from nunchaku_py.engine import Engine, jobs_of
from nunchaku_py.models.plan import plan
from nunchaku_py.quantize import context_of
from nunchaku_py.recipes import Recipe
from nunchaku_py.site import Mode, Site, auto_mode
from nunchaku_py.swap import Quantized, prepare, quantized_sites, replace_modules

DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 128, "pooled_projection_dim": 64,
    "in_channels": 16, "axes_dims_rope": (16, 24, 24), "guidance_embeds": True}
BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\b")
BYTES = {"bf16": 2.0, "a4": 0.65, "a8": 1.65, "a16": 0.65}  # per parameter, branch and packed scales included
ROOM, RESERVE = 0.92, 4e9  # of free memory; bytes for what a step computes at 1024²


def blocks_that_fit(free: int, kinds: Iterable[str]) -> tuple[int, int]:
    """(double, single), as many as fit the free bytes of a GPU together in all `kinds` (keys of BYTES), never none."""
    outside, double, single = parameters()
    most = (ROOM * free - RESERVE) / sum(BYTES[kind] for kind in kinds)
    count = int((most - outside) / (double + SINGLE / DOUBLE * single))
    count = max(1, min(DOUBLE, count))
    return count, count * SINGLE // DOUBLE


def parameters() -> tuple[int, int, int]:
    """Of the model: outside the blocks, in a double block, in a single block."""
    model = meta_model(1, 1)
    double, single = (sum(parameter.numel() for parameter in blocks.parameters())
                      for blocks in (model.transformer_blocks, model.single_transformer_blocks))
    return sum(parameter.numel() for parameter in model.parameters()) - double - single, double, single


def default_mode(recipe: Recipe, device: str) -> Mode:
    """What mode="auto" is there for the linears in blocks."""
    return auto_mode(Site(recipe.kind, recipe.format, recipe.group or 64), torch.device(device))


@torch.no_grad()
def random_model(double: int, single: int, distinct: int, device: str, **config: Any) -> nn.Module:
    """In bf16."""
    torch.manual_seed(0)
    model, state = meta_model(double, single, **config), {}
    for name, tensor in model.state_dict().items():
        source = source_of(name, distinct)
        state[name] = random_tensor(name, tensor.shape, device) if source == name else state[source].clone()
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def quantized_copy(model: nn.Module, recipe: Recipe, mode: str, distinct: int, **config: Any) -> nn.Module:
    """The quantized version of a `random_model`, which stays as it is."""
    modules = dict(quantized(model, recipe, distinct))
    made = meta_model(len(model.transformer_blocks), len(model.single_transformer_blocks), **config)
    rest = {name: tensor.clone() for name, tensor in model.state_dict().items()
            if name.rpartition(".")[0] not in modules}
    made.load_state_dict(rest, strict=False, assign=True)
    replace_modules(made, modules)
    prepare(made)
    for site in quantized_sites(made):
        site.set_mode(mode)
    return made.to(model.device).eval().requires_grad_(False)


def quantized(model: nn.Module, recipe: Recipe, distinct: int) -> Iterator[tuple[str, Quantized]]:
    """Name → module in place of each linear that the recipe quantizes. None is packed."""
    engine, made = Engine(recipe, context_of(recipe, BF16, seed=0)), {}
    for job in jobs_of(plan(model, recipe.kind)):
        if job.block == source_of(job.block, distinct):
            made |= engine.run(job, {name: model.get_submodule(name) for name in job.names}, {})[0]
        for name in job.names:
            source = source_of(name, distinct)
            yield name, made[name] if source == name else copy.deepcopy(made[source])


def source_of(name: str, distinct: int) -> str:
    """The name, of a module or tensor, that this one is a copy of. With `distinct` = 0 there are no copies."""
    return BLOCK.sub(lambda found: f"{found[1]}.{int(found[2]) % distinct if distinct else found[2]}", name, count=1)
