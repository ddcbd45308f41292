"""Scenes, the sentences that describe them, and what a sentence claims.

A scene is one to three things on a background. `draw` makes one at random, `describe` says a part of what is seen in
it, and `read` gives back what a sentence claims, so that a picture can be checked against the sentence alone.
"""
from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from ..errors import NunchakuError

SIDE = 64  # coordinates and radii are in pixels of a picture of this side
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
NEW_SHAPES = ("heart",)  # in no scene of the base models: what a LoRA can teach
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "dotted", "fading")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "white", "gray", "brown")
BACKDROPS = ("plain", "fading", "checkered")
PLACES = ("at the top left", "at the top", "at the top right", "on the left", "in the center", "on the right",
          "at the bottom left", "at the bottom", "at the bottom right")
RELATIONS = ("to the left of", "to the right of", "above", "below")
# Colour and shape never seen together in training: one for each shape.
HELD_OUT = frozenset({("red", "star"), ("blue", "circle"), ("green", "triangle"), ("yellow", "square"),
                      ("purple", "ring"), ("cyan", "cross")})
LONGEST = 28  # words of a caption, commas counted

# Places are where four patches of 16 pixels meet, in which FLUX sees a picture, and no thing reaches further than these
# four: a small model learns to draw a thing sooner when the same patches always show it.
RADII = {"small": (7.8, 8.6), "large": (12.0, 13.2)}
_TRIANGLES = ((0, 2, 7), (1, 6, 8))  # where three things stand, as indices of PLACES
_SIDE_BY_SIDE, _STACKED = (3, 5), (1, 7)
_COUNTS = (1, 2, 3)
_COUNT_WEIGHTS = (0.35, 0.4, 0.25)
_OPENINGS = ("", "a picture of ", "there is ")


@dataclass(frozen=True)
class Thing:
    """x, y: the centre; angle in radians."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Of two things, the first stands in `relation` to the second; of one or three, `places` says where each is."""

    things: tuple[Thing, ...]
    background: str
    backdrop: str
    relation: str | None = None
    places: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


@dataclass(frozen=True)
class Claim:
    """What a sentence says of one thing; None: nothing."""

    shape: str
    colour: str
    texture: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Claims:
    """What a sentence says. `relation` is of the first thing to the second."""

    things: tuple[Claim, ...]
    relation: str | None = None
    background: str | None = None
    backdrop: str | None = None


def draw(chance: random.Random, held_out: bool = False, shapes: tuple[str, ...] = SHAPES) -> Scene:
    """A random scene: one with a held-out pair of colour and shape in it, or one without any."""
    while True:
        scene = _any_scene(chance, shapes)
        if scene.held_out == held_out:
            return scene


def anything(chance: random.Random) -> Scene:
    """A random scene of all shapes, held-out pairs included, and nothing quite where it should be: what the checker
    has to know."""
    scene = _any_scene(chance, SHAPES + NEW_SHAPES)
    return replace(scene, things=tuple(_displaced(chance, thing) for thing in scene.things))


def _displaced(chance: random.Random, thing: Thing) -> Thing:
    return replace(thing, x=thing.x + chance.uniform(-3, 3), y=thing.y + chance.uniform(-3, 3),
                   radius=thing.radius * chance.uniform(0.97, 1.03), angle=2 * thing.angle)


def _any_scene(chance: random.Random, shapes: tuple[str, ...]) -> Scene:
    count = chance.choices(_COUNTS, _COUNT_WEIGHTS)[0]
    relation, places, spots = _arrangement(chance, count)
    things = tuple(_thing(chance, shapes, x, y) for x, y in spots)
    return Scene(things, chance.choice(BACKGROUNDS), chance.choice(BACKDROPS), relation, places)


def _arrangement(chance: random.Random, count: int) -> tuple[str | None, tuple[str, ...], list[tuple[float, float]]]:
    """(relation, places, centres): one thing anywhere in a 3 by 3 grid, two side by side or stacked, three in a
    triangle that stands on its tip or on its base."""
    if count == 2:
        relation = chance.choice(RELATIONS)
        cells = _SIDE_BY_SIDE if relation.startswith("to") else _STACKED
        spots = [_near(chance, cell) for cell in cells]
        return relation, (), spots[::-1] if relation in ("to the right of", "below") else spots
    cells = chance.choice(_TRIANGLES) if count == 3 else (chance.randrange(len(PLACES)),)
    return None, tuple(PLACES[cell] for cell in cells), [_near(chance, cell) for cell in cells]


def _near(chance: random.Random, cell: int) -> tuple[float, float]:
    row, column = divmod(cell, 3)
    return 16 * (column + 1) + chance.uniform(-1, 1), 16 * (row + 1) + chance.uniform(-1, 1)


def _thing(chance: random.Random, shapes: tuple[str, ...], x: float, y: float) -> Thing:
    size = chance.choice(SIZES)
    return Thing(chance.choice(shapes), chance.choice(COLOURS), chance.choices(TEXTURES, (2, 1, 1, 1))[0], size, x, y,
                 chance.uniform(*RADII[size]), chance.uniform(-0.1, 0.1))


def describe(scene: Scene, chance: random.Random) -> str:
    """A sentence that says some of what is in the scene; colours and shapes always."""
    while True:
        caption = _sentence(scene, chance)
        if len(re.findall(r"\w+|,", caption)) <= LONGEST:
            return caption


def described(count: int, seed: int | str, held_out: bool = False) -> tuple[list[Scene], list[str]]:
    """Random scenes and a caption of each; held out: with a pair of colour and shape that no training scene has."""
    chance = random.Random(seed)
    scenes, captions = [], []
    for _ in range(count):
        scenes.append(draw(chance, held_out))
        captions.append(describe(scenes[-1], chance))
    return scenes, captions


def _sentence(scene: Scene, chance: random.Random) -> str:
    """What is not said of where things are is as usual, so that a caption never leaves it open."""
    phrases = [_phrase(thing, chance) for thing in scene.things]
    usual = _as_usual(scene)
    for i in _placed(len(scene.places), usual, chance):
        phrases[i] += f" {scene.places[i]}"
    if len(phrases) == 2 and (not usual or chance.random() < 0.6):
        things = f"{phrases[0]} {scene.relation} {phrases[1]}"
    else:
        first = sorted(range(len(phrases)), key=lambda i: _reading_order(scene.things[i]))
        *phrases, last = (phrases[i] for i in first)
        things = " and ".join(filter(None, (", ".join(phrases), last)))
    opening = chance.choice(_OPENINGS)
    if chance.random() < 0.1:
        return opening + things
    kind = "" if scene.backdrop == "plain" else f"{scene.backdrop} "
    ground = f"on a {kind}{scene.background} background"
    return f"{ground}, {things}" if chance.random() < 0.2 else f"{opening}{things} {ground}"


def _as_usual(scene: Scene) -> bool:
    """One thing in the center, two side by side, three in a triangle on its tip."""
    if scene.relation:
        return scene.relation.startswith("to")
    return scene.places in ((PLACES[4],), tuple(PLACES[cell] for cell in _TRIANGLES[0]))


def _placed(count: int, usual: bool, chance: random.Random) -> list[int]:
    """The things whose place is said: at least one where it is not the usual one."""
    found = [i for i in range(count) if chance.random() < 0.5]
    return found if usual or found or not count else [chance.randrange(count)]


def _reading_order(thing: Thing) -> float:
    """As people name what they see: the upper first, then the left."""
    return 2 * thing.y + thing.x


def _phrase(thing: Thing, chance: random.Random) -> str:
    said = 0.3 if thing.texture == "plain" else 0.85
    words = [thing.size if chance.random() < 0.65 else "", thing.texture if chance.random() < said else "",
             thing.colour, thing.shape]
    words = [word for word in words if word]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


_THING = re.compile(
    rf"\b(?:an? )?(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<texture>{'|'.join(TEXTURES)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES + NEW_SHAPES)})"
    rf"(?: (?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))})\b)?")
_GROUND = re.compile(
    rf"on an? (?:(?P<backdrop>{'|'.join(BACKDROPS)}) )?(?P<background>{'|'.join(BACKGROUNDS)}) background")
_RELATED = re.compile(rf"^ ({'|'.join(RELATIONS)}) $")


def phrases(caption: str) -> list[tuple[int, int]]:
    """From where to where a caption speaks of each thing, its place and its relation to the next included."""
    found = [match.span() for match in _THING.finditer(caption.lower())]
    if len(found) == 2:
        between = _RELATED.match(caption.lower()[found[0][1]:found[1][0]])
        if between:
            found[0] = (found[0][0], found[1][0] - 1)
    return found


def read(caption: str) -> Claims:
    """What a caption claims; NunchakuError where it names no thing of this world."""
    text = " ".join(caption.lower().split())
    found = list(_THING.finditer(text))
    if not found:
        raise NunchakuError(f"'{caption}' names no thing that can be checked: say a colour ({', '.join(COLOURS)}) and "
                            f"a shape ({', '.join(SHAPES + NEW_SHAPES)})")
    ground = _GROUND.search(text)
    between = _RELATED.match(text[found[0].end():found[1].start()]) if len(found) == 2 else None
    return Claims(tuple(Claim(**match.groupdict()) for match in found), between and between.group(1),
                  *((ground["background"], ground["backdrop"]) if ground else (None, None)))
