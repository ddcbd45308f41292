"""Does a picture show what its caption says? A small network that sees things and their attributes decides.

The network looks at a 64 × 64 picture and answers, for each cell of a 16 × 16 grid, whether a thing is centred there
and which shape, colour, texture and size it has, and for the whole picture which background. A caption is right if
there are as many things as it names and they can be matched to its claims, every one of which has to hold.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import NunchakuError
from .scenes import (
    BACKDROPS,
    BACKGROUNDS,
    COLOURS,
    NEW_SHAPES,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Claim,
    Claims,
    read,
)

ATTRIBUTES = {"shape": SHAPES + NEW_SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
GROUNDS = {"background": BACKGROUNDS, "backdrop": BACKDROPS}
GRID = 16
CELL = SIDE // GRID
CHANNELS, DILATIONS = 64, (1, 1, 2, 1, 2, 1, 1)
TAPPED = (0, 3, 6)  # the blocks whose outputs are features of pictures
WEIGHTS = Path(__file__).parent / "checker.safetensors"


class _Block(nn.Module):
    """x + two convolutions of it"""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.first = _convolution(channels, channels, 3, dilation=dilation)
        self.second = _convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
                         nn.BatchNorm2d(outputs))


@dataclass
class Seen:
    """Logits: centre (B, 1, G, G); shift (B, 2, G, G), in pixels from the middle of the cell; of each attribute of a
    thing (B, n, G, G), of each of the ground (B, n)."""

    centre: Tensor
    shift: Tensor
    attributes: dict[str, Tensor]
    grounds: dict[str, Tensor]


class Checker(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, CHANNELS // 2, 5, stride=2), nn.ReLU(),
                                  _convolution(CHANNELS // 2, CHANNELS, 3, stride=2), nn.ReLU())
        self.blocks = nn.ModuleList(_Block(CHANNELS, dilation) for dilation in DILATIONS)
        self.cells = nn.Conv2d(CHANNELS, 3 + sum(map(len, ATTRIBUTES.values())), 1)
        self.whole = nn.Linear(CHANNELS, sum(map(len, GROUNDS.values())))

    def features(self, pictures: Tensor) -> list[Tensor]:
        """(B, C, G, G) of the tapped blocks, the last one's being what the answers are read from."""
        x = self.stem(pictures * 2 - 1)
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPPED:
                found.append(x)
        return found

    def forward(self, pictures: Tensor) -> Seen:
        x = self.features(pictures)[-1]
        centre, shift, *attributes = self.cells(x).split([1, 2, *map(len, ATTRIBUTES.values())], dim=1)
        grounds = self.whole(x.mean((2, 3))).split([*map(len, GROUNDS.values())], dim=1)
        return Seen(centre, shift, dict(zip(ATTRIBUTES, attributes, strict=True)),
                    dict(zip(GROUNDS, grounds, strict=True)))


@dataclass(frozen=True)
class Found:
    """A thing as the network sees it."""

    x: float
    y: float
    shape: str
    colour: str
    texture: str
    size: str

    @property
    def place(self) -> str:
        column, row = (min(2, max(0, round((at - 17) / 15))) for at in (self.x, self.y))
        return PLACES[3 * row + column]


@dataclass(frozen=True)
class Sight:
    """A picture as the network sees it."""

    things: tuple[Found, ...]
    background: str
    backdrop: str


def load_checker() -> Checker:
    """The trained network that is shipped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    checker = Checker()
    try:
        values = load_file(WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise NunchakuError(f"{WEIGHTS}: cannot be loaded: {error}; reinstall nunchaku-py") from error
    checker.load_state_dict({name: value.float() if value.is_floating_point() else value
                             for name, value in values.items()})
    return checker.eval()


@torch.no_grad()
def look(checker: Checker, pictures: Tensor) -> list[Sight]:
    """What is seen in each of (B, 3, 64, 64) pictures in [0, 1]."""
    seen = checker(pictures)
    # Logits are compared: probabilities next to each other can all be rounded to one.
    peaks = (seen.centre >= 0) & (seen.centre == F.max_pool2d(seen.centre, 5, stride=1, padding=2))
    return [_sight(seen, peaks[i, 0], i) for i in range(len(pictures))]


def _sight(seen: Seen, peaks: Tensor, i: int) -> Sight:
    things = []
    for row, column in peaks.nonzero().tolist():
        at = seen.shift[i, :, row, column].tolist()
        named = {name: names[int(seen.attributes[name][i, :, row, column].argmax())]
                 for name, names in ATTRIBUTES.items()}
        things.append(Found(CELL * (column + 0.5) + at[0], CELL * (row + 0.5) + at[1], **named))
    return Sight(tuple(things), *(names[int(seen.grounds[name][i].argmax())] for name, names in GROUNDS.items()))


def agrees(sight: Sight, claims: Claims) -> bool:
    """Whether everything that is claimed is seen, and no other thing."""
    if len(sight.things) != len(claims.things):
        return False
    if any(claimed not in (None, seen) for claimed, seen in
           ((claims.background, sight.background), (claims.backdrop, sight.backdrop))):
        return False
    return any(all(map(_is, order, claims.things)) and _related(order, claims.relation)
               for order in permutations(sight.things))


def _is(found: Found, claim: Claim) -> bool:
    return all(getattr(claim, name) in (None, getattr(found, name)) for name in (*ATTRIBUTES, "place"))


def _related(order: Sequence[Found], relation: str | None) -> bool:
    if relation is None:
        return True
    dx, dy = order[1].x - order[0].x, order[1].y - order[0].y
    sideways = relation.startswith("to")
    ahead = dx if sideways else dy
    if relation in ("to the right of", "below"):
        ahead = -ahead
    return ahead > abs(dy if sideways else dx)


def agreement(checker: Checker, pictures: Tensor, captions: Sequence[str]) -> list[bool]:
    """For each picture, whether it shows what its caption says."""
    return [agrees(sight, read(caption)) for sight, caption in zip(look(checker, pictures), captions, strict=True)]
