"""What tests of modulation tables share: tiny pipelines that have some, and what they draw without."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py.tables.foresee import tables_of
from nunchaku_py.tables.store import Tables
from tests.checks import same_bits
from tests.tiny import MODELS, PIPELINES
from tests.tiny_models import POOLED, TEXT, TEXT_DIM, normal
from tests.tiny_pipelines import call, flux_call, flux_vae

STEPS = 5


def quantized_model(case: str = "flux") -> tuple[nn.Module, dict]:
    model, inputs = MODELS[case]()
    nq.quantize(model, "rtn-int4")
    return model, inputs


def flux(**more: Any) -> tuple[Any, dict]:
    return PIPELINES["flux"]()[0], flux_call() | more


def qwen_image(**more: Any) -> tuple[Any, dict]:
    """With a second prompt: two calls of the model in every step."""
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
                                           latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    pipe = diffusers.QwenImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None,
                                       MODELS["qwen_image"]()[0])
    embeds = dict(prompt_embeds=normal(1, TEXT, TEXT_DIM), prompt_embeds_mask=torch.ones(1, TEXT, dtype=torch.long))
    negative = dict(negative_prompt_embeds=normal(1, TEXT, TEXT_DIM, seed=7),
                    negative_prompt_embeds_mask=torch.ones(1, TEXT, dtype=torch.long))
    return pipe, call(height=64, width=64, true_cfg_scale=3.0, **embeds, **negative) | more


def sd3(**more: Any) -> tuple[Any, dict]:
    """With guidance: a batch of two prompts."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=MODELS["sd3"]()[0], scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=flux_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    embeds = dict(prompt_embeds=normal(1, TEXT, TEXT_DIM), pooled_prompt_embeds=normal(1, POOLED))
    negative = {f"negative_{name}": -one for name, one in embeds.items()}
    return pipe, call(height=16, width=16, **embeds, **negative) | more


def draw(pipe: Any, arguments: dict, **more: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    fresh = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS}
    return pipe(**(arguments | fresh | more)).images


def quantized_pipeline(build: Callable[..., tuple[Any, dict]] = flux) -> tuple[Any, dict, Tables]:
    pipe, arguments = build()
    nq.quantize(pipe.transformer, "rtn-int4")
    nq.cache_modulation(pipe)
    return pipe, arguments, tables(pipe.transformer)


def tables(model: nn.Module) -> Tables:
    return next(table.tables for _, table in tables_of(model))


def counted(found: Tables) -> tuple[int, int, int]:
    return found.counts.hits, found.counts.misses, found.counts.schedules


@contextmanager
def without_tables(target: Any) -> Iterator[None]:
    """For a reference of the same model in the same state: the attributes are put aside, not the tables emptied."""
    aside = list(tables_of(target))
    for site, _ in aside:
        site.table = None
    try:
        yield
    finally:
        for site, table in aside:
            site.table = table


def agree(pipe: Any, arguments: dict, **more: Any) -> bool:
    """Whether the pipeline draws with tables what it draws without."""
    found = draw(pipe, arguments, **more)
    with without_tables(pipe.transformer):
        return same_bits(found, draw(pipe, arguments, **more))
