"""What both denoisers learn from: the scenes as latents of the trained autoencoder, and captions as tokens."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import captions as texts
from . import layout
from .data import random_rows, scenes, seen
from .loop import DEVICE, OUT, low_precision, save_whole
from .vae import trained_first

UNCONDITIONAL = 0.1  # part of the captions that are left out, so that classifier-free guidance works
BATCH = 200
TIMES = {1: 1, 2: 2, 3: 4}  # by number of things: more of them teach more, and are learned last


@dataclass
class Examples:
    """Latents (N, C, side, side), shifted and scaled to mean 0 and deviation 1, with PER_SCENE captions for each.

    times: how often as others each scene is seen; default: all alike."""

    latents: Tensor
    maps: layout.Maps
    tokens: texts.Tokens
    empty: texts.Tokens
    times: Tensor | None = None

    def __post_init__(self) -> None:
        times = torch.ones(len(self.latents), dtype=torch.long) if self.times is None else self.times
        self.pool = torch.arange(len(self.latents)).repeat_interleave(times)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, layout.Maps, Tensor, Tensor]:
        """(latents, maps of what is where, T5 tokens, CLIP tokens), some captions empty."""
        of = self.pool[random_rows(len(self.pool), size, generator)]
        rows = of * texts.PER_SCENE + random_rows(texts.PER_SCENE, size, generator)
        without = (torch.rand(size, generator=generator) < UNCONDITIONAL)[:, None]
        t5, clip = (torch.where(without, getattr(self.empty, kind), getattr(self.tokens, kind)[rows])
                    for kind in ("t5", "clip"))
        return self.latents[of].float(), self.maps[of], t5, clip


def examples(model: str) -> Examples:
    drawn, known = scenes("scenes"), encoded(model)
    sentences = texts.captions(drawn)
    times = torch.tensor([TIMES[len(scene.things)] for scene in drawn])
    return Examples((known.latents[:len(drawn)] - known.shift) * known.scale, layout.maps(drawn),
                    texts.tokens(sentences), texts.tokens([""]), times)


@dataclass
class Encoded:
    """Latents of `data.seen()`; shift and scale as an autoencoder's config names them."""

    latents: Tensor
    shift: float
    scale: float


def encoded(model: str) -> Encoded:
    """Made once for each state of the encoder, and for the same pictures."""
    vae, pixels = trained_first(model), seen()
    path = OUT / f"latents-{model}.pt"
    made_from = _digest(*vae.encoder.state_dict().values(), pixels)
    kept = torch.load(path, map_location=DEVICE, weights_only=True) if path.exists() else {}
    if kept.get("made_from") != made_from:
        with torch.inference_mode(), low_precision():
            parts = [vae.encoder(part.float() / 127.5 - 1).chunk(2, dim=1)[0].half() for part in pixels.split(BATCH)]
        kept = {"made_from": made_from, "latents": torch.cat(parts)}
        save_whole(kept, path)
    sample = kept["latents"][:4000].float()
    return Encoded(kept["latents"], sample.mean().item(), 1 / sample.std().item())


def _digest(*values: Tensor) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()
