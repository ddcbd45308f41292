"""A 16-bit folder of FLUX.1-dev's size, 24 GB of random weights, to quantize from disk:

    python -m benchmarks.flux_folder /tmp/flux-16bit            (--quick: one block of each kind)
    nunchaku-py quantize /tmp/flux-16bit /tmp/flux-int4

A weight is what trained ones look like to a quantizer: normal numbers whose channels differ in size (log-normal,
σ = 0.3, both ways), a few input channels eight times as large, and 64 directions whose singular values decay like 1/i,
which hold a fifth of the energy. Every block is drawn anew. Delete the folder afterwards.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.flux_size import BF16, WEIGHTS, Shards, meta_flux

SIZE = (19, 38)  # double and single blocks of FLUX.1-dev
LARGE = 6  # of a weight's input channels
DIRECTIONS = 64


def weight(n: int, k: int, generator: torch.Generator) -> Tensor:
    """(N,K) bf16, of a variance that keeps the size of its input."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    drawn = torch.empty(n, k, dtype=BF16).normal_(generator=generator)
    columns, rows = (normal(k) * 0.3).exp(), (normal(n) * 0.3).exp()
    columns[torch.randperm(k, generator=generator)[:LARGE]] *= 8
    decay = 1 / torch.arange(1, DIRECTIONS + 1)
    strength = 0.5 * (n * k) ** 0.5 * decay / decay.square().sum().sqrt()
    left, right = normal(n, DIRECTIONS) / n**0.5, normal(DIRECTIONS, k) / k**0.5
    for start in range(0, n, 512):  # no fp32 copy of the whole
        part = slice(start, start + 512)
        wide = drawn[part].float().mul_(columns).mul_(rows[part, None]).addmm_(left[part] * strength, right)
        drawn[part] = wide.mul_(k**-0.5)
    return drawn


def tensors(shapes: dict[str, torch.Size], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        if len(shape) == 2:
            yield name, weight(*shape, generator)
        elif "norm_" in name:
            yield name, torch.ones(shape, dtype=BF16)
        else:
            yield name, torch.empty(shape, dtype=BF16).normal_(std=0.02, generator=generator)


def build(folder: Path, double: int, single: int, seed: int = 0) -> None:
    started, model = time.monotonic(), meta_flux(double, single)
    blocks = [*(f"transformer_blocks.{i}." for i in range(double)),
              *(f"single_transformer_blocks.{i}." for i in range(single))]
    shards, state = Shards(folder, len(blocks) + 1), model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for index, front in enumerate((*blocks, "")):
        own = {name: tensor.shape for name, tensor in state.items()
               if (name.startswith(front) if front else not name.startswith(tuple(blocks)))}
        shards.write(index, dict(tensors(own, generator)))
        part = front.rstrip(".") or "the rest"
        print(f"  [{index + 1}/{len(blocks) + 1}] {part}: {time.monotonic() - started:.0f} s", flush=True)
    shards.finish()
    model.save_config(folder)
    print(f"{shards.size / 1e9:.2f} GB in {folder} ({WEIGHTS}-…), {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=SIZE[0])
    parser.add_argument("--single", type=int, default=SIZE[1])
    parser.add_argument("--quick", action="store_true", help="one block of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = (1, 1) if args.quick else (args.double, args.single)
    build(args.folder, *count, args.seed)


if __name__ == "__main__":
    main()
