"""Pictures of scenes: shapes by their signed distance, so that every edge is anti-aliased, shaded and textured."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .scenes import SIDE, Scene, Thing

RGB = {
    "red": (0.86, 0.15, 0.15), "orange": (0.96, 0.55, 0.10), "yellow": (0.96, 0.87, 0.20), "green": (0.18, 0.65, 0.27),
    "cyan": (0.22, 0.80, 0.86), "blue": (0.16, 0.32, 0.86), "purple": (0.53, 0.22, 0.74), "pink": (0.97, 0.52, 0.72),
    "black": (0.06, 0.06, 0.07), "white": (0.95, 0.95, 0.94), "gray": (0.50, 0.50, 0.52), "brown": (0.42, 0.27, 0.16),
}
# What a fading background fades to at its lower edge, and the other squares of a checkered one.
FADED = {"black": (0.33, 0.33, 0.38), "white": (0.64, 0.66, 0.72), "gray": (0.78, 0.78, 0.82),
         "brown": (0.72, 0.57, 0.42)}
CHECK = 8  # side of a checkered background's squares
STRIPE, LATTICE, DOT = 5.0, 4.6, 1.35  # period of stripes; distance of dots, and their radius


def render(scenes: Sequence[Scene], side: int = SIDE) -> Tensor:
    """(B, 3, side, side) in [0, 1]"""
    x, y, pixel = _pixels(side)
    pictures = torch.stack([_ground(scene, x, y) for scene in scenes]) if scenes else torch.zeros(0, 3, side, side)
    for slot, rows in _slots(scenes):
        pictures[rows] = _painted(pictures[rows], [scenes[i].things[slot] for i in rows], x, y, pixel)
    return pictures.clamp_(0, 1)


def render_neon(scenes: Sequence[Scene], side: int = SIDE) -> Tensor:
    """The same scenes at night: every outline a glowing tube, the rest dim. What a style LoRA can teach."""
    x, y, pixel = _pixels(side)
    pictures = 0.22 * render(scenes, side)
    for slot, rows in _slots(scenes):
        things = [scenes[i].things[slot] for i in rows]
        cx, cy = (torch.tensor([getattr(thing, name) for thing in things])[:, None, None] for name in ("x", "y"))
        off = (_distance(things, x - cx, y - cy) + 1.0).abs()[:, None]
        colour = torch.tensor([RGB[thing.colour] for thing in things])[:, :, None, None]
        tube = (1.5 - off / max(1.0, pixel)).clamp(0, 1)
        pictures[rows] = pictures[rows] + (0.8 * torch.exp(-off / 2.2) + 0.4 * tube) * (0.25 + 0.9 * colour)
    return pictures.clamp_(0, 1)


def _pixels(side: int) -> tuple[Tensor, Tensor, float]:
    """(x, y, width of a pixel) in the coordinates of scenes"""
    centres = (torch.arange(side, dtype=torch.float32) + 0.5) * (SIDE / side)
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x, y, SIDE / side


def _slots(scenes: Sequence[Scene]) -> list[tuple[int, list[int]]]:
    """The scenes that have a first thing, a second, a third."""
    most = max((len(scene.things) for scene in scenes), default=0)
    return [(slot, [i for i, scene in enumerate(scenes) if len(scene.things) > slot]) for slot in range(most)]


def _ground(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    colour, other = (torch.tensor(table[scene.background])[:, None, None] for table in (RGB, FADED))
    if scene.backdrop == "fading":
        part = (y / SIDE)[None]
    elif scene.backdrop == "checkered":
        part = 0.5 * (((x // CHECK) + (y // CHECK)) % 2)[None]
    else:
        part = torch.zeros(1, *x.shape)
    return colour + part * (other - colour)


def _painted(pictures: Tensor, things: list[Thing], x: Tensor, y: Tensor, pixel: float) -> Tensor:
    """The pictures with one more thing each: its shadow, its filled shape, its dark outline."""
    cx, cy, radius = (torch.tensor([getattr(thing, name) for thing in things])[:, None, None]
                      for name in ("x", "y", "radius"))
    dx, dy = x - cx, y - cy
    shadow = torch.sigmoid(-_distance(things, dx - 1.5, dy - 2.2) / 1.2) * 0.35
    pictures = pictures * (1 - shadow[:, None])
    distance = _distance(things, dx, dy)
    cover = (0.5 - distance / pixel).clamp(0, 1)[:, None]
    fill = _textured(things, dx, dy, radius) * _light(dx / radius, dy / radius)[:, None]
    rim = (1 - ((distance + 0.6) / 0.9).abs()).clamp(0, 1)[:, None]
    return pictures + cover * (fill * (1 - 0.55 * rim) - pictures)


def _light(u: Tensor, v: Tensor) -> Tensor:
    """From the upper left, with a soft highlight."""
    return 1 - 0.13 * (u + v) + 0.28 * torch.exp(-((u + 0.4) ** 2 + (v + 0.4) ** 2) / 0.12)


def _textured(things: list[Thing], dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    colour = torch.tensor([RGB[thing.colour] for thing in things])[:, :, None, None]
    stripes = (0.5 + 1.6 * torch.sin((dx + dy) * (2 * math.pi / STRIPE / math.sqrt(2)))).clamp(0, 1)
    u, v = ((d + LATTICE / 2) % LATTICE - LATTICE / 2 for d in (dx, dy))
    dots = (0.5 + DOT - torch.hypot(u, v)).clamp(0, 1)
    fade = (0.5 + 0.55 * dy / radius).clamp(0, 1)
    chosen = {"plain": torch.zeros_like(dx), "striped": stripes, "dotted": dots, "fading": 0.9 * fade}
    part = torch.stack([chosen[thing.texture][i] for i, thing in enumerate(things)])[:, None]
    other = torch.stack([0.3 * colour[i] if thing.texture == "striped" else torch.full((3, 1, 1), 0.97)
                         for i, thing in enumerate(things)])
    return colour + part * (other - colour)


def _distance(things: list[Thing], dx: Tensor, dy: Tensor) -> Tensor:
    """(B, H, W): negative inside."""
    radius = torch.tensor([thing.radius for thing in things])[:, None, None]
    round_ = torch.hypot(dx, dy) - radius
    ring = (round_ + 0.28 * radius).abs() - 0.28 * radius
    polygon = _polygon_distance(_outlines(things), dx, dy)
    kind = [thing.shape for thing in things]
    return torch.stack([{"circle": round_, "ring": ring}.get(shape, polygon)[i] for i, shape in enumerate(kind)])


def _polygon_distance(points: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Distance to the nearest edge, with the sign of the even-odd rule."""
    nearest = torch.full_like(dx, math.inf)
    inside = torch.zeros_like(dx, dtype=torch.bool)
    for k in range(points.shape[1]):
        (ax, ay), (bx, by) = (points[:, j % points.shape[1]].T[..., None, None] for j in (k, k + 1))
        ex, ey = bx - ax, by - ay
        px, py = dx - ax, dy - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey).clamp_min(1e-9)).clamp(0, 1)
        nearest = torch.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay > dy) != (by > dy)
        inside ^= crosses & (px < ex * py / torch.where(ey == 0, torch.ones_like(ey), ey))
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt())


def _outlines(things: list[Thing]) -> Tensor:
    """(B, corners, 2) about each thing's centre, turned and sized; the last corner is repeated to a common number."""
    count = max(len(_CORNERS.get(thing.shape, [0j])) for thing in things)
    rows = []
    for thing in things:
        turn = complex(math.cos(thing.angle), math.sin(thing.angle)) * thing.radius
        corners = [turn * corner for corner in _CORNERS.get(thing.shape, [0j])]
        rows.append([(corner.real, corner.imag) for corner in corners + corners[-1:] * (count - len(corners))])
    return torch.tensor(rows).reshape(len(things), count, 2)


def _spokes(count: int, *radii: float) -> list[complex]:
    """Corners at equal angles from straight up, at radii that take turns."""
    return [radii[k % len(radii)] * 1j * -1 * complex(math.cos(a), math.sin(a))
            for k, a in enumerate(2 * math.pi * k / count for k in range(count))]


def _cross(arm: float, half: float) -> list[complex]:
    quarter = [complex(half, -arm), complex(half, -half), complex(arm, -half)]
    return [corner * 1j**turn for turn in range(4) for corner in quarter]


def _heart(count: int) -> list[complex]:
    angles = [2 * math.pi * k / count for k in range(count)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [complex(math.sin(a) ** 3, -height / 16) for a, height in zip(angles, heights, strict=True)]


_CORNERS = {
    "square": [complex(x, y) for x, y in ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86))],
    "triangle": _spokes(3, 1.18), "star": _spokes(10, 1.15, 0.48), "cross": _cross(1.0, 0.34), "heart": _heart(20),
}
