"""The autoencoders: `python -m benchmarks.training.vae sdxl`, then `python -m benchmarks.training.vae flux`.

tiny-sdxl's latents are four times smaller in each direction and have 8 channels. tiny-flux's have FLUX's own geometry,
eight times smaller and 16 channels, so that a picture is few tokens; that autoencoder starts from the finest levels of
the first. Squared and absolute error of the pixels, and a light pull towards a normal distribution so that the latents
are smooth enough to be drawn from noise.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import together
from .data import random_rows, seen
from .loop import Plan, Run, averaged, low_precision, parser, prepared

WIDTHS = {"sdxl": (32, 32, 48), "flux": (32, 32, 48, 40)}
LATENT_CHANNELS = {"sdxl": 8, "flux": 16}
PULL = 1e-4
PLAN = Plan(steps=2000, batch=16, rate=1.5e-3, warmup=100, fall=0.6, average=0.99)


def autoencoder(model: str) -> nn.Module:
    from diffusers import AutoencoderKL

    widths = WIDTHS[model]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, layers_per_block=1, latent_channels=LATENT_CHANNELS[model], norm_num_groups=8,
        mid_block_add_attention=False, sample_size=64, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0)


def trained_first(model: str) -> nn.Module:
    """What this script gives; its latents are not scaled."""
    vae = autoencoder(model)
    vae.load_state_dict(averaged(f"vae-{model}"))
    return vae.eval()


def trained(model: str) -> nn.Module:
    """The same with the decoder that was trained on by itself (decoder.py)."""
    vae = trained_first(model)
    vae.decoder.load_state_dict(averaged(f"decoder-{model}"))
    return vae


def with_fine_levels(vae: nn.Module, of: nn.Module) -> nn.Module:
    """`vae`, one level deeper than `of`, with the levels of `of` that are the same in both."""
    source, found = of.state_dict(), vae.state_dict()
    for name, value in found.items():
        given = source.get(_one_level_finer(name))
        if "mid_block" not in name and given is not None and given.shape == value.shape:
            found[name] = given
    vae.load_state_dict(found)
    return vae


def _one_level_finer(name: str) -> str:
    """Decoders count their levels from the coarsest."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "up_blocks"]:
        parts[2] = str(int(parts[2]) - 1)
    return ".".join(parts)


def _fresh(model: str) -> nn.Module:
    return autoencoder(model) if model == "sdxl" else with_fine_levels(autoencoder(model), trained("sdxl"))


def main() -> None:
    options = parser(__doc__, PLAN)
    options.add_argument("model", choices=WIDTHS)
    arguments = options.parse_args()
    plan = prepared(arguments, PLAN)
    pixels = seen()
    vae = _fresh(arguments.model).to(memory_format=torch.channels_last)
    run = Run(f"vae-{arguments.model}", vae, plan)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        wanted = pixels[random_rows(len(pixels), plan.batch, generator)].float() / 127.5 - 1
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
    together.run(main)
