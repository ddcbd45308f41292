"""The stress leaves a model's function as it was, and makes its activations hard."""
from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from benchmarks.quality.stress import GROUP, change_of, hardness, places_of, stress
from benchmarks.training import flux, sdxl
from nunchaku_py.calibrate import State
from nunchaku_py.demo.measure import outputs, relative_error

MODELS = ("flux", "sdxl")


@cache
def model(name: str) -> nn.Module:
    """Of the shipped shape, its weights random, none of its biases 0."""
    torch.manual_seed(0)
    made = (flux.transformer() if name == "flux" else sdxl.unet()).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def states(name: str, seed: int = 0, count: int = 3, batch: int = 4) -> list[State]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)
    generator, found = torch.Generator().manual_seed(seed), []
    places, width = flux.image_ids(), model("flux").config.in_channels
    for i in range(count):
        at = torch.full((batch,), (i + 0.5) / count)
        found.append({
            "hidden_states": random(batch, len(places), width), "encoder_hidden_states": random(batch, 32, 128),
            "pooled_projections": random(batch, 64), "timestep": at, "txt_ids": torch.zeros(32, 3),
            "img_ids": places,
        } if name == "flux" else {
            "sample": random(batch, 8, 16, 16), "timestep": 1000 * at, "encoder_hidden_states": random(batch, 32, 192),
            "added_cond_kwargs": {"text_embeds": random(batch, 128), "time_ids": torch.full((batch, 6), 64.0)}})
    return [State((), kwargs) for kwargs in found]


@cache
def stressed(name: str) -> nn.Module:
    made = copy.deepcopy(model(name))
    stress(made, states(name))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name: str) -> None:
    new = states(name, seed=1)
    assert relative_error(outputs(stressed(name), new), outputs(model(name), new)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_rounding_to_16_bit_costs_a_stressed_model_no_more(name: str) -> None:
    new = states(name, seed=1)
    exact = outputs(model(name), new)

    def noise(which: nn.Module) -> float:
        rounded = copy.deepcopy(which)
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
        return relative_error(outputs(rounded, new), exact)
    with torch.no_grad():
        assert noise(stressed(name)) < 1.3 * noise(model(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_channel_is_20_to_30_times_the_median(name: str) -> None:
    assert all(one.channels < 8 for one in hardness(model(name), states(name)))
    assert all(20 <= one.channels <= 30 for one in hardness(stressed(name), states(name)))
    # of other inputs, which are independent noise here: about that
    assert all(15 <= one.channels <= 45 for one in hardness(stressed(name), states(name, seed=1)))


@pytest.mark.parametrize("name", MODELS)
def test_some_tokens_stand_out_where_attention_makes_the_input(name: str) -> None:
    mixed = {name for place in places_of(model(name)) if place.mixes for name in place.measured}
    before, after = ({one.linear: one.tokens for one in hardness(which, states(name)) if one.linear in mixed}
                     for which in (model(name), stressed(name)))
    assert before.keys() == after.keys() == mixed
    assert max(before.values()) < 4 and all(8 < value < 20 for value in after.values())


@pytest.mark.parametrize("name", MODELS)
def test_every_writer_and_every_reader_has_its_part(name: str) -> None:
    """Whatever is left out of a place, the function is another: nothing is undone by chance."""
    some = states(name, count=1, batch=1)
    exact = outputs(model(name), some)
    generator = torch.Generator().manual_seed(0)
    block = places_of(model(name))[0].readers[0].split("attn")[0]
    for place in (place for place in places_of(model(name)) if place.readers[0].startswith(block)):
        change = change_of([torch.randn(200, place.width, generator=generator).double()], place.mixes, generator)
        parts = [replace(place, readers=tuple(r for r in place.readers if r != one)) for one in place.readers]
        parts += [replace(place, writers=tuple(w for w in place.writers if w != one)) for one in place.writers]
        for part in parts:
            broken = copy.deepcopy(model(name))
            with torch.no_grad():
                part.apply(broken, change)
            assert relative_error(outputs(broken, some), exact) > 2e-5, part


def test_a_rotation_is_spread_over_the_whole_of_every_second_group() -> None:
    x = torch.randn(300, 4 * GROUP, generator=torch.Generator().manual_seed(0)).double()
    change = change_of([x], True, torch.Generator().manual_seed(0))
    for group in range(4):
        inside = slice(group * GROUP, (group + 1) * GROUP)
        assert (change[inside, inside].count_nonzero() > GROUP) == (group % 2 == 1)
        change[inside, inside] = 0
    assert not change.any()


def test_the_same_seed_gives_the_same_model() -> None:
    again = copy.deepcopy(model("flux"))
    stress(again, states("flux"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stressed("flux").parameters(), strict=True))


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no block of it is known"):
        places_of(nn.Sequential(nn.Linear(8, 8)))
