"""Captions of scenes as tokens, several for each scene, with what they claim as numbers."""
from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nunchaku_py.demo.scenes import (
    BACKDROPS,
    BACKGROUNDS,
    COLOURS,
    NEW_SHAPES,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Claims,
    Scene,
    describe,
)

from .text_models import TOKENS, clip_tokenizer, t5_tokenizer

PER_SCENE, CAPTION_SEED, CAPITALS = 3, 11, 0.2
# What a word that names a thing has to know: the value, or 0 where the caption does not say.
SAID = {"shape": SHAPES + NEW_SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "place": PLACES}
RELATED = len(RELATIONS)
GROUND = {"background": BACKGROUNDS, "backdrop": BACKDROPS}


@dataclass
class Tokens:
    """(N, 32) for each tokenizer; caption i is of scene i // PER_SCENE."""

    t5: Tensor
    clip: Tensor


def captions(scenes: list[Scene]) -> list[str]:
    """PER_SCENE sentences for each scene, one after the other, a fifth of them with a capital."""
    chance = random.Random(CAPTION_SEED)
    found = []
    for scene in scenes:
        for _ in range(PER_SCENE):
            text = describe(scene, chance)
            found.append(text[0].upper() + text[1:] if chance.random() < CAPITALS else text)
    return found


def tokens(texts: list[str]) -> Tokens:
    return Tokens(*(torch.tensor(tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True).input_ids)
                    for tokenizer in (t5_tokenizer(), clip_tokenizer())))


def claimed(claims: Claims) -> list[list[int]]:
    """A row of numbers for each thing named, in the order of the sentence: SAID's values and its part in a relation."""
    rows = []
    for i, thing in enumerate(claims.things):
        row = [_index(values, getattr(thing, name)) for name, values in SAID.items()]
        rows.append([*row, 0 if claims.relation is None else 1 + 2 * RELATIONS.index(claims.relation) + i])
    return rows


def claimed_ground(claims: Claims) -> list[int]:
    return [_index(values, getattr(claims, name)) for name, values in GROUND.items()]


def _index(values: tuple[str, ...], value: str | None) -> int:
    return 0 if value is None else 1 + values.index(value)
