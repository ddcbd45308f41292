"""A second question for the denoisers while they learn: which thing is where, and what is it?

From the states in the middle of the denoiser, a linear head has to say for each of 8 × 8 cells of the picture which
shape, colour, texture and size covers it, or none. So the words of a caption find their places sooner than by the noise
alone; the head is thrown away.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nunchaku_py.demo.scenes import COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Scene

CELLS = 8
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
ANSWERS = [1 + len(values) for values in ATTRIBUTES.values()]
COVERED = 4.0  # how much more a cell with a thing in it counts than an empty one


def maps(scenes: list[Scene]) -> Tensor:
    """(N, attributes, 8 · 8) uint8: 0 where nothing is, else 1 + the value's index."""
    middle = (torch.arange(CELLS) + 0.5) * (SIDE / CELLS)
    y, x = (part.reshape(-1) for part in torch.meshgrid(middle, middle, indexing="ij"))
    found = torch.zeros(len(scenes), len(ATTRIBUTES), CELLS * CELLS, dtype=torch.uint8)
    for slot in range(max(len(scene.things) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) > slot]
        things = [scenes[i].things[slot] for i in rows]
        at = torch.tensor([(thing.x, thing.y, thing.radius) for thing in things])[:, :, None]
        inside = torch.hypot(x - at[:, 0], y - at[:, 1]) < at[:, 2] + 1
        values = torch.tensor([[1 + named.index(getattr(thing, name)) for name, named in ATTRIBUTES.items()]
                               for thing in things], dtype=torch.uint8)
        found[rows] = torch.where(inside[:, None], values[:, :, None], found[rows])
    return found


class Question(nn.Module):
    """Listens to the output of a module inside the denoiser, (B, side², width) or (B, width, side, side); each state
    answers for the cells it covers."""

    def __init__(self, width: int, listened: nn.Module, side: int):
        super().__init__()
        self.side, self.cells = side, CELLS // side
        self.head = nn.Linear(width, self.cells ** 2 * sum(ANSWERS))
        self.heard: Tensor | None = None
        listened.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        self.heard = output if isinstance(output, Tensor) else output[1]  # FLUX's blocks: (text, picture)

    def loss(self, wanted: Tensor) -> Tensor:
        """wanted: rows of `maps`"""
        states = self.heard if self.heard.ndim == 3 else self.heard.flatten(2).transpose(1, 2)
        self.heard = None
        weight = 1 + (COVERED - 1) * (wanted[:, 0] > 0).float()
        found = self.head(states.float()).unflatten(2, (self.cells, self.cells, -1))
        found = found.unflatten(1, (self.side, self.side)).transpose(2, 3)  # rows, their cells, columns, their cells
        parts = found.flatten(1, 4).split(ANSWERS, dim=-1)
        lost = sum(F.cross_entropy(part.transpose(1, 2), wanted[:, i].long(), reduction="none")
                   for i, part in enumerate(parts))
        return (lost * weight).sum() / weight.sum()
