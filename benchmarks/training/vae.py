"""The autoencoder that both pipelines share: `python -m benchmarks.training.vae`.

Four times smaller in each direction, eight channels. Squared and absolute error of the pixels, and a light pull towards
a normal distribution so that the latents are smooth enough to be drawn from noise.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import pictures, random_rows
from .loop import Plan, Run, averaged, low_precision, parser, prepared

LATENT_CHANNELS = 8
PULL = 1e-4
PLAN = Plan(steps=1600, batch=16, rate=2.5e-3, warmup=100, fall=0.6, average=0.99)


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 48), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        mid_block_add_attention=False, sample_size=64, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0)


def trained_first() -> nn.Module:
    """What this script gives; its latents are not scaled."""
    vae = autoencoder()
    vae.load_state_dict(averaged("vae"))
    return vae.eval()


def trained() -> nn.Module:
    """The same with the decoder that was trained on by itself (decoder.py)."""
    vae = trained_first()
    vae.decoder.load_state_dict(averaged("decoder"))
    return vae


def main() -> None:
    plan = prepared(parser(__doc__, PLAN).parse_args(), PLAN)
    data = pictures("scenes")
    vae = autoencoder().to(memory_format=torch.channels_last)
    run = Run("vae", vae, plan)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        wanted = data.batch(random_rows(len(data.scenes), plan.batch, generator)) * 2 - 1
        wanted = wanted.to(memory_format=torch.channels_last)
        with low_precision():
            mean, spread = vae.encoder(wanted).float().chunk(2, dim=1)
            noise = torch.randn(mean.shape, generator=generator)
            drawn = mean + noise * (0.5 * spread.clamp(-20, 5)).exp()
            made = vae.decoder(drawn).float()
        squared = F.mse_loss(made, wanted)
        pull = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return (squared + 0.2 * F.l1_loss(made, wanted) + PULL * pull,
                {"psnr": (10 * torch.log10(4 / squared)).item(), "pull": pull.item()})

    run.train(loss)


if __name__ == "__main__":
    main()
