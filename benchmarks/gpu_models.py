"""Real architectures with random weights on a GPU, in bf16, quantized, and in FP8, within seconds.

Of each kind of block `distinct` are drawn, and really quantized; the others are copies of these, in memory of their
own. So a step reads as much as one of the real model, and the quantized model is the 4-bit version of the bf16 one.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.flux_size import BF16, meta_flux
from nunchaku_py.bench.inputs import Inputs, inputs_of
from nunchaku_py.bench.known import KNOWN
from nunchaku_py.bench.random_models import Sources, meta_model
from nunchaku_py.engine import Engine, jobs_of
from nunchaku_py.models.discover import blocks_of
from nunchaku_py.models.pattern import pattern_of
from nunchaku_py.models.plan import plan
from nunchaku_py.quantize import context_of
from nunchaku_py.recipes import Recipe
from nunchaku_py.site import Mode, Site, auto_mode
from nunchaku_py.swap import Quantized, prepare, quantized_sites, replace_modules

DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 128, "pooled_projection_dim": 64,
    "in_channels": 16, "axes_dims_rope": (16, 24, 24), "guidance_embeds": True}
TINY_UNET: dict[str, Any] = {
    "block_out_channels": (64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": (1, 2, 2),
    "layers_per_block": 1, "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 112}
# Bytes per parameter, branch and packed scales included. fp8: the modulation's linears stay in bf16.
BYTES = {"bf16": 2.0, "fp8": 1.3, "a4": 0.65, "a8 int8": 1.65, "a8 int4": 0.65, "a16": 0.65}
ROOM, RESERVE = 0.92, 4e9  # of free memory; bytes for what a step computes at 1024²


# ------------------------------------------------------------------------------------------------------- architectures
class _Blocks:
    """What both architectures share."""

    batch: int
    text: int

    def empty(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self, model: nn.Module, pixels: int, device: str) -> Inputs:
        return inputs_of(model, pixels, pixels, self.text, self.batch, device)

    @property
    def block_names(self) -> list[str]:
        """Of the model in bf16: nothing is found in blocks whose linears are quantized."""
        model = self.empty()
        return list(blocks_of(model, pattern_of(model)))


@dataclass(frozen=True)
class Flux(_Blocks):
    """FLUX.1-dev's transformer with so many blocks of both kinds, for one image."""

    double: int
    single: int
    text: int  # tokens of the prompt
    config: Mapping[str, Any] = field(default_factory=dict)  # where a smaller one is wanted
    name, batch = "FLUX.1", 1

    @property
    def blocks(self) -> str:
        return f"{self.double}+{self.single}"

    def empty(self) -> nn.Module:
        return meta_flux(self.double, self.single, **self.config)

    def tokens(self, pixels: int) -> int:
        return (pixels // 16)**2 + self.text


@dataclass(frozen=True)
class Sdxl(_Blocks):
    """SDXL's UNet; a batch of 2 is one image with classifier-free guidance, as its pipeline runs it."""

    batch: int
    text: int
    config: Mapping[str, Any] = field(default_factory=dict)
    name = "SDXL"

    @property
    def blocks(self) -> str:
        return str(len(self.block_names))

    def empty(self) -> nn.Module:
        known = KNOWN["sdxl"]
        return meta_model({"_class_name": known.cls, **known.config, **self.config}, known.about)

    def tokens(self, pixels: int) -> int:
        """Where they are most: at 1/16 of the image."""
        return (pixels // 16)**2


Architecture = Flux | Sdxl


def blocks_that_fit(free: int, kinds: Iterable[str]) -> tuple[int, int]:
    """(double, single) of FLUX.1, as many as fit the free bytes of a GPU together in all `kinds` (keys of BYTES), never
    none."""
    outside, double, single = parameters()
    most = (ROOM * free - RESERVE) / sum(BYTES[kind] for kind in kinds)
    count = int((most - outside) / (double + SINGLE / DOUBLE * single))
    count = max(1, min(DOUBLE, count))
    return count, count * SINGLE // DOUBLE


def parameters() -> tuple[int, int, int]:
    """Of FLUX.1: outside the blocks, in a double block, in a single block."""
    model = meta_flux(1, 1)
    double, single = (sum(parameter.numel() for parameter in blocks.parameters())
                      for blocks in (model.transformer_blocks, model.single_transformer_blocks))
    return sum(parameter.numel() for parameter in model.parameters()) - double - single, double, single


def default_mode(recipe: Recipe, device: str) -> Mode:
    """What mode="auto" is there for the linears in blocks."""
    return auto_mode(Site(recipe.kind, recipe.format, recipe.group or 64), torch.device(device))


# ------------------------------------------------------------------------------------------------------------ copies
@torch.no_grad()
def quantized_copy(what: Architecture, model: nn.Module, recipe: Recipe, mode: str, weights: str, distinct: int
                   ) -> nn.Module:
    """The quantized version of a `random_model`, which stays as it is."""
    modules = dict(quantized(model, recipe, distinct))
    made = what.empty()
    rest = {name: tensor.clone() for name, tensor in model.state_dict().items()
            if name.rpartition(".")[0] not in modules}
    made.load_state_dict(rest, strict=False, assign=True)
    replace_modules(made, modules)
    prepare(made)
    for site in quantized_sites(made):
        site.set_mode(mode, now=False)
        site.set_weights(weights)
    return made.to(model.device).eval().requires_grad_(False)


def quantized(model: nn.Module, recipe: Recipe, distinct: int) -> Iterator[tuple[str, Quantized]]:
    """Name → module in place of each linear that the recipe quantizes. None is packed."""
    engine, made = Engine(recipe, context_of(recipe, BF16, seed=0)), {}
    source_of = Sources(model, distinct)
    for job in jobs_of(plan(model, recipe.kind)):
        if job.block == source_of(job.block):
            made |= engine.run(job, {name: model.get_submodule(name) for name in job.names}, {})[0]
        for name in job.names:
            source = source_of(name)
            yield name, made[name] if source == name else copy.deepcopy(made[source])


@torch.no_grad()
def fp8_copy(what: Architecture, model: nn.Module) -> nn.Module:
    """By torchao: the linears whose activations ours quantizes, in FP8, with a scale for every row."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    names = {name for name, kind in plan(model).choices.items() if kind == "w4a4"}
    made = what.empty()
    made.load_state_dict({name: tensor if name.removesuffix(".weight") in names else tensor.clone()
                          for name, tensor in model.state_dict().items()}, assign=True)
    made.eval().requires_grad_(False)
    quantize_(made, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
              filter_fn=lambda module, name: name in names)
    return made
