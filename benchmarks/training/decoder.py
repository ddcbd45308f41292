"""The autoencoder's decoder, trained on while the encoder stays: `python -m benchmarks.training.decoder`.

Latents are fixed from here on, so the denoisers can be trained at the same time. A little noise on the latents makes
the decoder forgive what a denoiser leaves behind, and some of the pictures glow, so that a style can be taught later.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nunchaku_py.demo.render import render_neon

from .data import pictures, random_rows, to_bytes
from .latents import encoded
from .loop import DEVICE, OUT, Plan, Run, low_precision, parser, prepared, save_whole
from .vae import trained_first

PLAN = Plan(steps=2600, batch=16, rate=2e-3, warmup=100, fall=0.7, average=0.995)
NOISE = 0.15  # at most, in deviations of the latents
GLOWING = 4000  # pictures in the neon style


def main() -> None:
    plan = prepared(parser(__doc__, PLAN).parse_args(), PLAN)
    vae = trained_first().to(memory_format=torch.channels_last)
    pixels, latents = _pairs()
    spread = latents[:4000].float().std().item()

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = random_rows(len(pixels), plan.batch, generator)
        strength = NOISE * spread * torch.rand(plan.batch, 1, 1, 1, generator=generator)
        at = latents[rows].float()
        at = at + strength * torch.randn(at.shape, generator=generator)
        wanted = pixels[rows].float() / 127.5 - 1
        with low_precision():
            made = vae.decoder(at.to(memory_format=torch.channels_last)).float()
        squared = F.mse_loss(made, wanted)
        return squared + 0.2 * F.l1_loss(made, wanted), {"psnr": (10 * torch.log10(4 / squared)).item()}

    Run("decoder", vae.decoder, plan).train(loss)


def _pairs() -> tuple[Tensor, Tensor]:
    """(pictures, their latents): all scenes, and some of them glowing."""
    data = pictures("scenes")
    latents = encoded(data.pixels)[0]
    path = OUT / "pictures" / "neon.pt"
    if not path.exists():
        parts = [to_bytes(render_neon(data.scenes[i:i + 250])) for i in range(0, GLOWING, 250)]
        glowing = torch.cat(parts)
        encoder = trained_first().encoder
        with torch.inference_mode():
            means = [encoder(part.float() / 127.5 - 1).chunk(2, dim=1)[0] for part in glowing.split(250)]
        save_whole((glowing, torch.cat(means).half()), path)
    glowing, glowing_latents = torch.load(path, map_location=DEVICE, weights_only=True)
    return torch.cat([data.pixels, glowing]), torch.cat([latents, glowing_latents])


if __name__ == "__main__":
    main()
