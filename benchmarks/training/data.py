"""Scenes drawn once and kept as pictures: `python -m benchmarks.training.data`.

`scenes` are what the generators learn from: never a held-out pair of colour and shape. `anything` is what the checker
learns from: every shape, every pair. `neon` are the first scenes again, glowing.
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nunchaku_py.demo.render import render, render_neon
from nunchaku_py.demo.scenes import Scene, anything, draw

from .loop import DEVICE, OUT, save_whole

SHARD = 4000


@dataclass(frozen=True)
class Source:
    count: int
    seed: int
    scene: Callable[[random.Random], Scene] = draw
    render: Callable[[Sequence[Scene]], Tensor] = render


SOURCES = {"scenes": Source(40_000, 1), "anything": Source(32_000, 2, anything),
           "neon": Source(4000, 1, draw, render_neon)}


@dataclass
class Pictures:
    """Scenes with their pictures, uint8 (N, 3, 64, 64)."""

    scenes: list[Scene]
    pixels: Tensor

    def batch(self, rows: Tensor) -> Tensor:
        return self.pixels[rows].float() / 255


def scenes(name: str, count: int | None = None) -> list[Scene]:
    """The scenes of a set; shard i is drawn from its own seed."""
    source = SOURCES[name]
    found: list[Scene] = []
    while len(found) < (count or source.count):
        chance = random.Random(source.seed * 1000 + len(found) // SHARD)
        found += [source.scene(chance) for _ in range(SHARD)]
    return found


def pictures(name: str, shards: int | None = None) -> Pictures:
    """A set, rendered where it has not been before."""
    drawn = scenes(name, shards and shards * SHARD)
    folder = OUT / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for shard in range(len(drawn) // SHARD):
        chosen = drawn[shard * SHARD:(shard + 1) * SHARD]
        path = folder / f"{name}-{shard}-{_digest(chosen)}.pt"
        if not path.exists():
            rendered = [to_bytes(SOURCES[name].render(chosen[i:i + 250])) for i in range(0, SHARD, 250)]
            save_whole(torch.cat(rendered), path)
            print(f"rendered {path}", flush=True)
        parts.append(torch.load(path, map_location=DEVICE, weights_only=True))
    return Pictures(drawn, torch.cat(parts))


def _digest(drawn: list[Scene]) -> str:
    """Of what a shard shows: pictures of other scenes are drawn anew."""
    return hashlib.sha256(repr(drawn).encode()).hexdigest()[:12]


def seen() -> Tensor:
    """The pixels autoencoders learn from: all scenes, and some of them glowing, so that a style can be taught later."""
    return torch.cat([pictures("scenes").pixels, pictures("neon").pixels])


def to_bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)


def random_rows(count: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (batch,), generator=generator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in SOURCES:
        pictures(name)
