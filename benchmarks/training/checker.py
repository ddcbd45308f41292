"""The network that says whether a picture shows what its caption says: `python -m benchmarks.training.checker`.

It learns from renders of every shape and pair, half of them blurred, noisy or recoloured a little, so that it judges
generated pictures too. `--test` measures it on renders it has not seen.
"""
from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from nunchaku_py.demo.checker import ATTRIBUTES, CELL, GRID, GROUNDS, Checker, Seen, agreement
from nunchaku_py.demo.render import render
from nunchaku_py.demo.scenes import Scene, anything, describe

from . import together
from .data import pictures, random_rows
from .loop import Plan, Run, averaged, low_precision, parser, prepared

PLAN = Plan(steps=2200, batch=64, rate=3e-3, fall=0.6, average=0.99)
TEST_SEED, TESTED = 77, 2000


def main() -> None:
    options = parser(__doc__, PLAN)
    options.add_argument("--test", action="store_true", help="measure the trained network instead")
    arguments = options.parse_args()
    plan = prepared(arguments, PLAN)
    if arguments.test:
        print(f"right on {100 * tested(trained()):.2f} % of {TESTED} renders not seen before")
        return
    data = pictures("anything")
    targets = Targets(data.scenes)
    checker = Checker().to(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = random_rows(len(data.scenes), plan.batch, generator)
        seen_as = spoilt(data.batch(rows), generator).to(memory_format=torch.channels_last)
        with low_precision():
            seen = checker(seen_as)
        return targets.loss(seen, rows)

    Run("checker", checker, plan).train(loss)


def trained() -> Checker:
    checker = Checker()
    checker.load_state_dict(averaged("checker"))
    return checker.eval()


def tested(checker: Checker) -> float:
    chance = random.Random(TEST_SEED)
    scenes = [anything(chance) for _ in range(TESTED)]
    right = []
    for i in range(0, TESTED, 250):
        part = scenes[i:i + 250]
        right += agreement(checker, render(part), [describe(scene, chance) for scene in part])
    return sum(right) / TESTED


def spoilt(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures with other brightness and contrast, blur and noise."""
    count = len(pictures)
    half = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).float()
    gain, lift = (1 + half * s * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1) for s in (0.08, 0.04))
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = half * torch.rand(count, 1, 1, 1, generator=generator)
    noise = half * 0.06 * torch.rand(count, 1, 1, 1, generator=generator)
    made = torch.lerp(pictures, blurred, blur) * gain + (lift - 1)
    return (made + noise * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


class Targets:
    """What the network should answer for each scene, as indices of pictures, cells and values."""

    def __init__(self, scenes: list[Scene]):
        rows = [(i, thing) for i, scene in enumerate(scenes) for thing in scene.things]
        self.start = torch.tensor([0, *torch.tensor([len(scene.things) for scene in scenes]).cumsum(0).tolist()])
        self.x, self.y = (torch.tensor([getattr(thing, axis) for _, thing in rows]) for axis in "xy")
        self.attributes = {name: torch.tensor([values.index(getattr(thing, name)) for _, thing in rows])
                           for name, values in ATTRIBUTES.items()}
        self.grounds = {name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
                        for name, values in GROUNDS.items()}

    def loss(self, seen: Seen, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        things = torch.cat([torch.arange(self.start[row], self.start[row + 1]) for row in rows])
        owner = torch.repeat_interleave(torch.arange(len(rows)), self.start[rows + 1] - self.start[rows])
        column, row = ((at[things] / CELL).long().clamp(0, GRID - 1) for at in (self.x, self.y))
        centre = torch.zeros(len(rows), GRID, GRID)
        centre[owner, row, column] = 1
        near = F.max_pool2d(centre[:, None], 3, stride=1, padding=1)[:, 0] - centre  # neighbours: not held against it
        logits = seen.centre[:, 0].float()
        found = (F.binary_cross_entropy_with_logits(logits, centre, reduction="none") * (1 - near)).sum() / len(things)
        shift = torch.stack([self.x[things] - CELL * (column + 0.5), self.y[things] - CELL * (row + 0.5)], 1)
        placed = F.smooth_l1_loss(seen.shift[owner, :, row, column].float(), shift)
        named = {name: F.cross_entropy(seen.attributes[name][owner, :, row, column].float(), wanted[things])
                 for name, wanted in self.attributes.items()}
        named |= {name: F.cross_entropy(seen.grounds[name].float(), self.grounds[name][rows]) for name in GROUNDS}
        return (found + 0.3 * placed + sum(named.values()),
                {"centre": found.item(), **{name: value.item() for name, value in named.items()}})


if __name__ == "__main__":
    together.run(main)
