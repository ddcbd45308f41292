"""What both denoisers learn from: the scenes as latents of the trained autoencoder, and captions as tokens."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import captions as texts
from . import layout
from .data import pictures, random_rows
from .loop import DEVICE, OUT, low_precision, save_whole
from .vae import trained_first

UNCONDITIONAL = 0.1  # part of the captions that are left out, so that classifier-free guidance works
BATCH = 200


@dataclass
class Examples:
    """Latents (N, C, 16, 16), shifted and scaled to mean 0 and deviation 1, with PER_SCENE captions for each."""

    latents: Tensor
    maps: Tensor
    tokens: texts.Tokens
    empty: texts.Tokens

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(latents, maps of what is where, T5 tokens, CLIP tokens), some captions empty."""
        rows = random_rows(len(self.tokens.t5), size, generator)
        without = (torch.rand(size, generator=generator) < UNCONDITIONAL)[:, None]
        t5, clip = (torch.where(without, getattr(self.empty, kind), getattr(self.tokens, kind)[rows])
                    for kind in ("t5", "clip"))
        of = rows // texts.PER_SCENE
        return self.latents[of].float(), self.maps[of], t5, clip


def examples() -> Examples:
    data = pictures("scenes")
    latents, shift, scale = encoded(data.pixels)
    sentences = texts.captions(data.scenes)
    return Examples((latents - shift) * scale, layout.maps(data.scenes), texts.tokens(sentences), texts.tokens([""]))


def encoded(pixels: Tensor) -> tuple[Tensor, float, float]:
    """(latents, shift, scale) as the autoencoder's config names them; encoded once."""
    path = OUT / "latents.pt"
    if not path.exists():
        vae = trained_first()
        with torch.inference_mode(), low_precision():
            parts = [vae.encoder(part.float() / 127.5 - 1).chunk(2, dim=1)[0].half() for part in pixels.split(BATCH)]
        save_whole(torch.cat(parts), path)
    latents = torch.load(path, map_location=DEVICE, weights_only=True)
    sample = latents[:4000].float()
    return latents, sample.mean().item(), 1 / sample.std().item()
