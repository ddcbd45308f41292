"""Pictures of scenes."""

import math
import random
from dataclasses import replace

import pytest
import torch

from nunchaku_py.demo.render import RGB, render, render_neon
from nunchaku_py.demo.scenes import NEW_SHAPES, SHAPES, Scene, Thing, draw


def scene(shape: str = "circle", radius: float = 13.0, texture: str = "plain", **thing) -> Scene:
    return Scene((replace(Thing(shape, "red", texture, "large", 32.0, 32.0, radius, 0.0), **thing),), "black", "plain")


def covered(picture: torch.Tensor) -> float:
    """Pixels of a red thing on black, edges by their share."""
    return (picture[0] > 0.3).float().sum().item()


AREAS = {  # in squares of the radius
    "circle": math.pi, "ring": math.pi * (1 - 0.44**2), "square": 1.72**2, "triangle": 0.75 * math.sqrt(3) * 1.18**2,
    "star": 10 * 0.5 * 1.15 * 0.48 * math.sin(math.pi / 5), "cross": 4 * 0.68 * 1 - 0.68**2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_of_the_shapes(shape):
    found = covered(render([scene(shape)], 512)[0]) / 64  # 8 × 8 pixels are one of the scene's
    assert found == pytest.approx(AREAS[shape] * 13**2, rel=0.06)  # the rim is darker than the threshold in places


def test_a_turned_thing_has_the_same_area():
    upright, turned = render([scene("square"), scene("square", angle=0.5)], 256)
    assert covered(turned) == pytest.approx(covered(upright), rel=0.02)


def test_edges_are_anti_aliased():
    picture = render([scene("circle")])[0, 0]
    across = picture[32]
    assert ((across > 0.1) & (across < 0.6)).any()
    small = render([scene("circle", x=32.3)])[0, 0]
    assert not torch.equal(small, picture)  # a third of a pixel shows


def test_every_side_shows_the_same_scene():
    scenes = [draw(random.Random(seed)) for seed in range(4)]
    large = torch.nn.functional.avg_pool2d(render(scenes, 256), 4)
    assert (large - render(scenes)).abs().mean() < 0.01


@pytest.mark.parametrize("one,other", [("plain", "striped"), ("plain", "dotted"), ("plain", "fading"),
                                       ("striped", "dotted")])
def test_textures_differ(one, other):
    first, second = render([scene(texture=one), scene(texture=other)])
    assert (first - second).abs().max() > 0.3


def test_no_scene_no_picture():
    assert render([]).shape == (0, 3, 64, 64) and render_neon([]).shape == (0, 3, 64, 64)


def test_pictures_do_not_depend_on_their_batch():
    scenes = [draw(random.Random(seed), shapes=SHAPES + NEW_SHAPES) for seed in range(12)]
    together = render(scenes)
    for picture, one in zip(together, scenes, strict=True):
        torch.testing.assert_close(render([one])[0], picture, atol=1e-5, rtol=0)
    assert together.min() >= 0 and together.max() <= 1


def test_neon_is_dark_with_bright_outlines():
    plain, glowing = render([scene("ring")]), render_neon([scene("ring")])
    assert glowing.mean() < plain.mean() and glowing.max() > 0.9


def test_every_colour_is_its_own():
    colours = torch.tensor(list(RGB.values()))
    distance = torch.cdist(colours, colours) + 10 * torch.eye(len(colours))
    assert distance.min() > 0.2
