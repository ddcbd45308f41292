"""An autoencoder's decoder, trained on while the encoder stays: `python -m benchmarks.training.decoder flux`.

Latents are fixed from here on, so the denoisers can be trained at the same time. A little noise on the latents makes
the decoder forgive what a denoiser leaves behind.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import together
from .data import random_rows, seen
from .latents import encoded
from .loop import Plan, Run, low_precision, parser, prepared
from .vae import WIDTHS, trained_first

PLAN = Plan(steps=2600, batch=16, rate=2e-3, warmup=100, fall=0.7, average=0.995)
NOISE = 0.15  # at most, in deviations of the latents


def main() -> None:
    options = parser(__doc__, PLAN)
    options.add_argument("model", choices=WIDTHS)
    arguments = options.parse_args()
    plan = prepared(arguments, PLAN)
    vae = trained_first(arguments.model).to(memory_format=torch.channels_last)
    pixels, known = seen(), encoded(arguments.model)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = random_rows(len(pixels), plan.batch, generator)
        strength = NOISE / known.scale * torch.rand(plan.batch, 1, 1, 1, generator=generator)
        at = known.latents[rows].float()
        at = at + strength * torch.randn(at.shape, generator=generator)
        wanted = pixels[rows].float() / 127.5 - 1
        with low_precision():
            made = vae.decoder(at.to(memory_format=torch.channels_last)).float()
        squared = F.mse_loss(made, wanted)
        return squared + 0.2 * F.l1_loss(made, wanted), {"psnr": (10 * torch.log10(4 / squared)).item()}

    Run(f"decoder-{arguments.model}", vae.decoder, plan).train(loss)


if __name__ == "__main__":
    together.run(main)
