"""Scenes, captions and what captions claim."""

import itertools
import random

import pytest

from nunchaku_py.demo.scenes import (
    COLOURS,
    HELD_OUT,
    LONGEST,
    PLACES,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    Claims,
    Scene,
    Thing,
    anything,
    describe,
    described,
    draw,
    read,
)
from nunchaku_py.errors import NunchakuError


def scenes(count: int, seed: int = 0, **options):
    chance = random.Random(seed)
    return [draw(chance, **options) for _ in range(count)]


def as_named(scene: Scene, claims: Claims) -> list[Thing]:
    """Its things in the order of a caption: of a relation as it says, else the upper row first, and from the left."""
    if claims.relation:
        return list(scene.things)
    apart = len(scene.things) == 3 or abs(scene.things[0].y - scene.things[-1].y) > SIDE / 4
    return sorted(scene.things, key=lambda thing: (apart and thing.y > SIDE / 2, thing.x))


def test_held_out_pairs_are_one_of_each_shape_and_never_drawn():
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    assert not any(scene.held_out for scene in scenes(500))
    assert all(scene.held_out for scene in scenes(100, held_out=True))
    assert any(scene.held_out for scene in (anything(random.Random(seed)) for seed in range(50)))


def test_the_same_seed_draws_the_same():
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=1)


def test_scenes_come_with_their_captions():
    for seed, held_out in ((0, False), ("of text", True)):
        drawn, captions = described(20, seed, held_out)
        assert (drawn, captions) == described(20, seed, held_out) and len(drawn) == 20
        for scene, caption in zip(drawn, captions, strict=True):
            assert scene.held_out == held_out
            claims = read(caption)
            said = [(claim.colour, claim.shape) for claim in claims.things]
            assert said == [(thing.colour, thing.shape) for thing in as_named(scene, claims)]
    assert described(3, 0)[1] == described(5, 0)[1][:3] != described(3, 1)[1]


def test_things_are_inside_and_apart():
    for scene in scenes(500):
        for thing in scene.things:
            low, high = RADII[thing.size]
            assert low <= thing.radius <= high
            assert 0 < thing.x < SIDE and 0 < thing.y < SIDE
        for first, second in itertools.combinations(scene.things, 2):
            assert ((first.x - second.x) ** 2 + (first.y - second.y) ** 2) ** 0.5 >= first.radius + second.radius


def test_things_stand_where_four_patches_meet_and_fit_into_them():
    """What a model of 16 × 16 patches learns soonest; the checker knows them elsewhere too."""
    for scene in scenes(300):
        for thing in scene.things:
            off = [abs(at - 16 * round(at / 16)) for at in (thing.x, thing.y)]
            assert max(off) <= 1 and 16 <= round(thing.x / 16) * 16 <= 48 and thing.radius + max(off) <= 16
    chance = random.Random(0)
    shaken = [thing for _ in range(300) for thing in anything(chance).things]
    assert max(abs(thing.x - 16 * round(thing.x / 16)) for thing in shaken) > 3
    assert all(0 < thing.x < SIDE and 0 < thing.y < SIDE for thing in shaken)


def test_three_things_stand_in_a_triangle():
    found = {scene.places for scene in scenes(500) if len(scene.things) == 3}
    assert found == {("at the top left", "at the top right", "at the bottom"),
                     ("at the top", "at the bottom left", "at the bottom right")}


def test_what_is_not_said_of_places_is_as_usual():
    chance = random.Random(7)
    unsaid = []
    for scene in scenes(3000):
        claims = read(describe(scene, chance))
        if claims.relation is None and not any(claim.place for claim in claims.things):
            unsaid.append((len(scene.things), scene.places, scene.relation))
    assert {(count, places) for count, places, _ in unsaid if count != 2} == {
        (1, ("in the center",)), (3, ("at the top left", "at the top right", "at the bottom"))}
    assert {relation for count, _, relation in unsaid if count == 2} == {"to the left of", "to the right of"}


@pytest.mark.parametrize("seed", range(3))
def test_a_caption_claims_what_the_scene_shows(seed):
    chance = random.Random(seed)
    said = set()
    for _ in range(1000):
        scene = draw(chance)
        caption = describe(scene, chance)
        claims = read(caption)
        assert len(caption.replace(",", " ,").split()) <= LONGEST
        assert len(claims.things) == len(scene.things)
        for claim, thing in zip(claims.things, as_named(scene, claims), strict=True):
            assert (claim.shape, claim.colour) == (thing.shape, thing.colour)
            assert claim.texture in (None, thing.texture) and claim.size in (None, thing.size)
            assert claim.place is None or claim.place == scene.places[scene.things.index(thing)]
            said |= {claim.place}
        assert claims.relation in (None, scene.relation)
        assert claims.background in (None, scene.background)
        assert claims.backdrop in (None, scene.backdrop)
        said |= {claims.relation}
    assert said == {None, *PLACES, *RELATIONS}  # every place and relation is said, and left out, sometimes


def test_relations_are_where_they_say():
    for scene in scenes(400):
        if scene.relation is None:
            continue
        first, second = scene.things
        dx, dy = second.x - first.x, second.y - first.y
        ahead = {"to the left of": dx, "to the right of": -dx, "above": dy, "below": -dy}[scene.relation]
        assert ahead > (abs(dy) if scene.relation.startswith("to") else abs(dx))


def test_reading_by_hand():
    claims = read("A large striped Red circle  to the left of an orange star on a checkered gray background")
    assert claims.relation == "to the left of" and (claims.background, claims.backdrop) == ("gray", "checkered")
    assert claims.things[0].size == "large" and claims.things[0].texture == "striped"
    assert claims.things[1].colour == "orange" and claims.things[1].size is None
    assert read("there is a fading pink heart at the bottom right").things[0].place == "at the bottom right"
    assert read("a red circle at the top").things[0].place == "at the top"
    assert read("a red circle and a blue star").relation is None


@pytest.mark.parametrize("caption", ["", "a lighthouse at dusk", "a circle", COLOURS[0]])
def test_a_caption_of_another_world_is_refused(caption):
    with pytest.raises(NunchakuError, match="names no thing that can be checked"):
        read(caption)
