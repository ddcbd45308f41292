"""tiny-flux: a FluxTransformer2DModel and its text encoders, from noise: `python -m benchmarks.training.flux`.

Flow matching: at time σ the model sees (1 − σ)·latents + σ·noise and has to say noise − latents.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import text, together
from .latents import Examples, examples
from .layout import Question
from .loop import Plan, Run, low_precision, parser, prepared
from .text_models import CLIP_WIDTH, T5_WIDTH, TOKENS
from .vae import LATENT_CHANNELS

PLAN = Plan(steps=6400, batch=64, rate=1.5e-3)
GRID = 4  # patches of 2 × 2 latents in each direction
HEAD, ROPE = 128, (16, 56, 56)
MODULATIONS = ("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear")
# How attention starts: for each block and head the neighbour it looks at, by the NEAR fastest turning pairs of an axis.
NEIGHBOURS = (((0, 1), (0, -1)), ((1, 0), (-1, 0)), ((1, 1), (-1, -1)))
NEAR, LOOK = 3, 2.0
READERS = {"t5": "text_encoder_2", "clip": "text_encoder"}  # as text.py names them: as the pipeline does
PASSED = 0.4  # part of the noisy latents that is the first answer
WHERE = 0.4  # weight of the second question
EVEN, NOISIER = 0.2, 0.7  # a part of the times is drawn evenly; the others logit-normal, where the layout is decided


def transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS["flux"], num_layers=1, num_single_layers=2,
        attention_head_dim=HEAD, num_attention_heads=2, joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH, guidance_embeds=False, axes_dims_rope=ROPE)


def packed(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) → (B, h·w, 4C), as the pipeline packs them."""
    batch, channels, height, width = latents.shape
    parts = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def image_ids() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.zeros(GRID, GRID), rows, columns], -1).reshape(-1, 3).float()


def times(count: int, generator: torch.Generator) -> Tensor:
    drawn = (torch.randn(count, generator=generator) + NOISIER).sigmoid()
    return torch.where(torch.rand(count, generator=generator) < EVEN, torch.rand(count, generator=generator), drawn)


class Drawer(nn.Module):
    """The denoiser, which is trained, and what reads its prompts, which has been."""

    def __init__(self, t5: nn.Module, clip: nn.Module, transformer: nn.Module) -> None:
        super().__init__()
        self.t5, self.clip = t5.requires_grad_(False), clip.requires_grad_(False)
        self.transformer = transformer
        self.question = Question(transformer.inner_dim, transformer.single_transformer_blocks[0], GRID)

    def forward(self, x: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor) -> Tensor:
        with torch.no_grad():
            words, _ = text.read_states("t5", self.t5, t5)
            _, pooled = text.read_states("clip", self.clip, clip)
        return self.transformer(
            hidden_states=x, encoder_hidden_states=words, pooled_projections=pooled, timestep=sigma,
            txt_ids=torch.zeros(TOKENS, 3), img_ids=image_ids(), return_dict=False)[0]


def fresh() -> Drawer:
    """Encoders that can read, and a denoiser that knows nothing."""
    found = text.trained("flux")
    return Drawer(found["t5"], found["clip"], _started(transformer()))


@torch.no_grad()
def _started(model: nn.Module) -> nn.Module:
    """Every block starts as the identity, what goes in comes out in part, and attention looks at neighbours: what a
    small model would need hundreds of steps to find."""
    for name, module in model.named_modules():
        if name.endswith(MODULATIONS):
            module.weight.zero_()
            module.bias.zero_()
    directions = nn.init.orthogonal_(torch.empty_like(model.x_embedder.weight))
    model.x_embedder.weight.copy_(directions)
    model.proj_out.weight.copy_(PASSED * directions.T)
    for block, offsets in zip([*model.transformer_blocks, *model.single_transformer_blocks], NEIGHBOURS, strict=True):
        _look_at(block.attn, offsets)
    return model


def _look_at(attention: nn.Module, offsets: tuple[tuple[int, int], ...]) -> None:
    """Biases of queries and keys that, turned by RoPE, agree most at an offset (rows, columns), one for each head."""
    for head, offset in enumerate(offsets):
        start = head * HEAD + ROPE[0]
        for size, distance in zip(ROPE[1:], offset, strict=True):
            angles = 10000.0 ** (-torch.arange(NEAR) * 2 / size)
            pairs = slice(start, start + 2 * NEAR)
            attention.to_q.bias[pairs] = LOOK * torch.tensor([1.0, 0.0]).repeat(NEAR)
            turned = torch.stack([(distance * angles).cos(), -(distance * angles).sin()], 1)
            attention.to_k.bias[pairs] = LOOK * turned.flatten()
            start += size


def losses(drawer: Drawer, data: Examples, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(of the velocity, of what is where)"""
    latents, maps, t5, clip = data.batch(batch, generator)
    latents = packed(latents)
    noise, sigma = torch.randn(latents.shape, generator=generator), times(batch, generator)
    at = sigma[:, None, None]
    with low_precision():
        found = drawer((1 - at) * latents + at * noise, sigma, t5, clip)
    return F.mse_loss(found.float(), noise - latents), drawer.question.loss(maps)


def main() -> None:
    plan = prepared(parser(__doc__, PLAN).parse_args(), PLAN)
    data = examples("flux")
    run = Run("flux", fresh(), plan)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        flow, where = losses(run.module, data, plan.batch, generator)
        return flow + WHERE * where, {"flow": flow.item(), "where": where.item()}

    run.train(loss)


if __name__ == "__main__":
    together.run(main)
