"""tiny-sdxl: a UNet2DConditionModel and its two text encoders, from noise: `python -m benchmarks.training.sdxl`.

Diffusion over SDXL's thousand steps; the model says the velocity √ā·noise − √(1 − ā)·latents.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nunchaku_py.demo.scenes import SIDE

from . import text, together
from .latents import Examples, examples
from .layout import Question
from .loop import DEVICE, Plan, Run, low_precision, parser, prepared
from .text_models import CLIP_WIDTH, WIDE_CLIP_WIDTH
from .vae import LATENT_CHANNELS

PLAN = Plan(steps=3000, batch=64, rate=1.2e-3)
SIZES = (SIDE, SIDE, 0, 0, SIDE, SIDE)  # original size, crop, target size: there is one size only
TIME_WIDTH = 32
READERS = {"clip": "text_encoder", "wide_clip": "text_encoder_2"}  # as text.py names them: as the pipeline does
WHERE = 0.1  # weight of the second question


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS["sdxl"], out_channels=LATENT_CHANNELS["sdxl"],
        block_out_channels=(64, 128),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),  # so it is called; these are numbers of heads, of 64 each
        cross_attention_dim=CLIP_WIDTH + WIDE_CLIP_WIDTH, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH, projection_class_embeddings_input_dim=6 * TIME_WIDTH + WIDE_CLIP_WIDTH,
        norm_num_groups=16)


def scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        timestep_spacing="trailing", steps_offset=1)


def kept() -> Tensor:
    """ā of each step: how much of the picture is left."""
    return scheduler().alphas_cumprod.to(DEVICE)


class Drawer(nn.Module):
    """The denoiser, which is trained, and what reads its prompts, which has been."""

    def __init__(self, clip: nn.Module, wide_clip: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.clip, self.wide_clip = clip.requires_grad_(False), wide_clip.requires_grad_(False)
        self.unet = unet
        self.question = Question(unet.config.block_out_channels[-1], unet.mid_block, 8)

    def forward(self, x: Tensor, step: Tensor, clip: Tensor) -> Tensor:
        with torch.no_grad():
            words, _ = text.read_states("clip", self.clip, clip)
            wide_words, pooled = text.read_states("wide_clip", self.wide_clip, clip)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([SIZES]).expand(len(x), -1).to(x)}
        return self.unet(x, step, torch.cat([words, wide_words], -1), added_cond_kwargs=added, return_dict=False)[0]


def fresh() -> Drawer:
    """Encoders that can read, and a denoiser that knows nothing."""
    found = text.trained("sdxl")
    return Drawer(found["clip"], found["wide_clip"], unet())


def losses(drawer: Drawer, kept: Tensor, data: Examples, batch: int,
           generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(of the velocity, of what is where); kept: ā of each step"""
    latents, maps, _, clip = data.batch(batch, generator)
    latents = latents.to(memory_format=torch.channels_last)
    noise = torch.randn(latents.shape, generator=generator)
    step = torch.randint(len(kept), (batch,), generator=generator)
    signal, spread = (part[step].sqrt()[:, None, None, None] for part in (kept, 1 - kept))
    with low_precision():
        found = drawer(signal * latents + spread * noise, step, clip)
    return F.mse_loss(found.float(), signal * noise - spread * latents), drawer.question.loss(maps)


def main() -> None:
    plan = prepared(parser(__doc__, PLAN).parse_args(), PLAN)
    data = examples("sdxl")
    signal = kept()
    run = Run("sdxl", fresh().to(memory_format=torch.channels_last), plan)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        velocity, where = losses(run.module, signal, data, plan.batch, generator)
        return velocity + WHERE * where, {"velocity": velocity.item(), "where": where.item()}

    run.train(loss)


if __name__ == "__main__":
    together.run(main)
