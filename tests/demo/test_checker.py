"""The checker knows a right picture from a wrong caption."""

import random
from dataclasses import replace

import pytest
import torch

from nunchaku_py import NunchakuError
from nunchaku_py.demo import checker as module
from nunchaku_py.demo.checker import Checker, Found, Sight, agreement, agrees, load_checker, look
from nunchaku_py.demo.render import render
from nunchaku_py.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Claim,
    Claims,
    anything,
    describe,
    draw,
    read,
)

RENDERS = 300


@pytest.fixture(scope="module")
def checker() -> Checker:
    return load_checker()


@pytest.fixture(scope="module")
def seen(checker):
    """(scenes, captions, what is seen in their pictures)"""
    chance = random.Random(4711)
    scenes = [anything(chance) for _ in range(RENDERS)]
    return scenes, [describe(scene, chance) for scene in scenes], look(checker, render(scenes))


def test_true_captions_of_real_renders_are_accepted(seen):
    _, captions, sights = seen
    right = sum(agrees(sight, read(caption)) for sight, caption in zip(sights, captions, strict=True))
    assert right >= 0.98 * RENDERS


def other(values, value, chance):
    return chance.choice([one for one in values if one != value])


@pytest.mark.parametrize("what", ["shape", "colour", "texture", "size", "place", "relation", "background", "count"])
def test_false_captions_are_refused(seen, what):
    chance = random.Random(1)
    wrong = tried = 0
    for caption, sight in zip(seen[1], seen[2], strict=True):
        claims = read(caption)
        told = falsified(claims, what, chance)
        if told is not None:
            tried += 1
            wrong += agrees(sight, told)
    assert tried >= 30 and wrong <= 0.02 * tried


def falsified(claims: Claims, what: str, chance: random.Random) -> Claims | None:
    """The claims with one of them false; None where that cannot be done surely."""
    if what == "background":
        return claims.background and replace(claims, background=other(BACKGROUNDS, claims.background, chance))
    if what == "count":
        return replace(claims, things=claims.things[:-1], relation=None)
    if what == "relation":
        opposite = dict(zip(RELATIONS, ("to the right of", "to the left of", "below", "above"), strict=True))
        alike = len(claims.things) == 2 and compatible(*claims.things)
        return None if claims.relation is None or alike else replace(claims, relation=opposite[claims.relation])
    if len(claims.things) > 1:
        return None  # another thing may fit what is said of this one
    values = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "place": PLACES}[what]
    thing = claims.things[0]
    if getattr(thing, what) is None:
        return None
    return replace(claims, things=(replace(thing, **{what: other(values, getattr(thing, what), chance)}),))


def compatible(first: Claim, second: Claim) -> bool:
    """Whether one thing could be both."""
    return all(None in (a, b) or a == b for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_noise_and_nothing_are_refused(checker):
    captions = [describe(draw(random.Random(seed)), random.Random(seed)) for seed in range(16)]
    noise = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not any(agreement(checker, noise, captions))
    assert not any(agreement(checker, torch.full((16, 3, 64, 64), 0.5), captions))


def test_matching_is_of_all_claims_to_different_things():
    left, right = (Found(x, 32.0, "circle", "red", "plain", "large") for x in (17.0, 47.0))
    blue = replace(right, colour="blue")
    one = Claim("circle", "red")
    assert agrees(Sight((left, right), "black", "plain"), Claims((one, one)))
    assert not agrees(Sight((left, blue), "black", "plain"), Claims((one, one)))
    assert not agrees(Sight((left,), "black", "plain"), Claims((one, one)))
    claims = Claims((Claim("circle", "blue"), one), relation="to the right of")
    assert agrees(Sight((left, blue), "black", "plain"), claims)
    assert not agrees(Sight((left, blue), "black", "plain"), replace(claims, relation="to the left of"))
    assert not agrees(Sight((left, blue), "black", "plain"), replace(claims, relation="above"))
    assert not agrees(Sight((left, blue), "black", "plain"), replace(claims, background="white"))
    assert not agrees(Sight((left, blue), "black", "plain"), replace(claims, backdrop="fading"))


def test_places_are_read_from_positions():
    named = {Found(x, y, "circle", "red", "plain", "small").place for x in (17, 32, 47) for y in (17, 32, 47)}
    assert named == set(PLACES)
    assert Found(0.0, 63.0, "circle", "red", "plain", "small").place == "at the bottom left"


def test_features_are_of_three_depths(checker):
    features = checker.features(torch.rand(2, 3, 64, 64))
    assert [part.shape for part in features] == [(2, 64, 16, 16)] * 3


def test_a_damaged_or_missing_checker_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WEIGHTS", tmp_path / "checker.safetensors")
    for content in (None, b"", module.Path(__file__).read_bytes()):
        if content is not None:
            module.WEIGHTS.write_bytes(content)
        with pytest.raises(NunchakuError, match=r"checker\.safetensors: cannot be loaded: .*; reinstall nunchaku-py"):
            load_checker()
