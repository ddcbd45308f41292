"""The LoRAs that are shipped: files diffusers loads, which teach what they are for and leave the rest as it was."""
from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nunchaku_py import NunchakuError
from nunchaku_py.demo import shipped
from nunchaku_py.demo.checker import agreement, load_checker
from nunchaku_py.demo.measure import paint
from nunchaku_py.demo.scenes import NEW_SHAPES, Scene, describe, described, draw

LORA_BYTES = 0.5e6
COUNT = 16


@pytest.fixture(scope="module", params=shipped.LORAS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(name: str) -> Any:
    return shipped.pipeline(shipped.LORAS[name])


def with_hearts(count: int) -> list[str]:
    """Captions of one or two things, one of them a heart."""
    chance = random.Random(77)

    def scene() -> Scene:
        while True:
            found = draw(chance, shapes=("circle", "square", *NEW_SHAPES))
            if len(found.things) < 3 and any(thing.shape in NEW_SHAPES for thing in found.things):
                return found

    return [describe(scene(), chance) for _ in range(count)]


def painted(pipe: Any, name: str, captions: list[str]) -> Tensor:
    return paint(pipe, captions, 0, shipped.CALLS[shipped.LORAS[name]])


def test_they_are_small_and_every_weight_of_theirs_is_used(name: str, pipe: Any) -> None:
    from safetensors import safe_open

    file = shipped.lora(name)
    assert file.stat().st_size <= LORA_BYTES and file.stat().st_mode & 0o044
    with safe_open(file, "pt") as tensors:
        count = len(list(tensors.keys()))
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}
    pipe.load_lora_weights(file, adapter_name="it")
    part = shipped.DENOISERS[shipped.LORAS[name]]
    assert pipe.get_list_adapters() == {part: ["it"]}
    taken = [key for key in getattr(pipe, part).state_dict() if ".lora_" in key]
    assert len(taken) == count >= 2 * 14


def test_what_they_teach(name: str, pipe: Any) -> None:
    """A style: dark pictures with tubes that glow. A thing: it is seen where it is said, which no base model can draw,
    and what the base model knew is still drawn."""
    style = name.endswith("neon")
    captions = described(COUNT, 5)[1] if style else with_hearts(COUNT)
    asked = [f"{caption} in neon style" for caption in captions] if style else captions
    before = painted(pipe, name, asked)
    pipe.load_lora_weights(shipped.lora(name), adapter_name="it")
    after = painted(pipe, name, asked)
    if style:
        assert after.mean() < 0.6 * before.mean() and after.flatten(1).amax(1).min() > 0.7
    else:
        seen = [sum(agreement(load_checker(), pictures, captions)) for pictures in (before, after)]
        assert seen[0] <= COUNT // 8 and seen[1] >= COUNT // 2, seen
        ordinary = described(COUNT, 6)[1]
        assert sum(agreement(load_checker(), painted(pipe, name, ordinary), ordinary)) >= 0.7 * COUNT
    pipe.set_adapters("it", 0.0)
    assert torch.equal(painted(pipe, name, asked[:4]), before[:4])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(NunchakuError, match="no shipped LoRA is called 'neon'; there are tiny-flux-neon, "):
        shipped.lora("neon")
