"""A second question for the denoisers while they learn: which thing is where, and what is it?

From the states in the middle of the denoiser, a linear head has to say for each of 8 × 8 cells of the picture which
shape, colour, texture and size covers it, or none, and how far away the thing's centre is and how large it is. So the
words of a caption find their places, and the parts of a thing each other, sooner than by the noise alone; the head is
thrown away.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nunchaku_py.demo.scenes import COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Scene

CELLS = 8
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
ANSWERS = [1 + len(values) for values in ATTRIBUTES.values()]
# Ways right and down to the centre, radius, angle: what is usual, and how far they are from it.
USUAL, SPREAD = (0.0, 0.0, 10.5, 0.0), (5.0, 5.0, 2.5, 0.125)
COVERED = 4.0  # how much more a cell with a thing in it counts than an empty one


@dataclass
class Maps:
    """kinds: (N, attributes, 8 · 8) uint8, 0 where nothing is, else 1 + the value's index; geometry: (N, 4, 8 · 8), of
    the thing there: the way to its centre, right and down, its radius and angle, each about as large as 1."""

    kinds: Tensor
    geometry: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Maps:
        return Maps(self.kinds[rows], self.geometry[rows])


def maps(scenes: list[Scene]) -> Maps:
    middle = (torch.arange(CELLS) + 0.5) * (SIDE / CELLS)
    y, x = (part.reshape(-1) for part in torch.meshgrid(middle, middle, indexing="ij"))
    kinds = torch.zeros(len(scenes), len(ATTRIBUTES), CELLS * CELLS, dtype=torch.uint8)
    geometry = torch.zeros(len(scenes), len(USUAL), CELLS * CELLS)
    usual, spread = torch.tensor(USUAL)[:, None], torch.tensor(SPREAD)[:, None]
    for slot in range(max(len(scene.things) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) > slot]
        things = [scenes[i].things[slot] for i in rows]
        at = torch.tensor([(thing.x, thing.y, thing.radius, thing.angle) for thing in things])[:, :, None]
        right, down = at[:, 0] - x, at[:, 1] - y
        inside = (torch.hypot(right, down) < at[:, 2] + 1)[:, None]
        values = torch.tensor([[1 + named.index(getattr(thing, name)) for name, named in ATTRIBUTES.items()]
                               for thing in things], dtype=torch.uint8)
        kinds[rows] = torch.where(inside, values[:, :, None], kinds[rows])
        found = torch.stack([right, down, *(at[:, i].expand_as(right) for i in (2, 3))], 1)
        geometry[rows] = torch.where(inside, (found - usual) / spread, geometry[rows])
    return Maps(kinds, geometry)


class Question(nn.Module):
    """Listens to the output of a module inside the denoiser, (B, side², width) or (B, width, side, side); each state
    answers for the cells it covers."""

    def __init__(self, width: int, listened: nn.Module, side: int):
        super().__init__()
        self.side, self.cells = side, CELLS // side
        self.head = nn.Linear(width, self.cells ** 2 * (sum(ANSWERS) + len(USUAL)))
        self.heard: Tensor | None = None
        listened.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        self.heard = output if isinstance(output, Tensor) else output[1]  # FLUX's blocks: (text, picture)

    def loss(self, wanted: Maps) -> Tensor:
        states = self.heard if self.heard.ndim == 3 else self.heard.flatten(2).transpose(1, 2)
        self.heard = None
        covered = (wanted.kinds[:, 0] > 0).float()
        weight = 1 + (COVERED - 1) * covered
        found = self.head(states.float()).unflatten(2, (self.cells, self.cells, -1))
        found = found.unflatten(1, (self.side, self.side)).transpose(2, 3)  # rows, their cells, columns, their cells
        *parts, geometry = found.flatten(1, 4).split([*ANSWERS, len(USUAL)], dim=-1)
        lost = sum(F.cross_entropy(part.transpose(1, 2), wanted.kinds[:, i].long(), reduction="none")
                   for i, part in enumerate(parts))
        off = (geometry.transpose(1, 2) - wanted.geometry).square().mean(1)
        return ((lost + off * covered) * weight).sum() / weight.sum()
