"""The same inputs give the same bits."""
from __future__ import annotations

import copy

import pytest
import torch

import nunchaku_py as nq
from tests.checks import QUICK, differences, run, state_of
from tests.tiny import MODELS, PIPELINES
from tests.tiny_models import TEXT
from tests.tiny_pipelines import SIZE

RECIPES = ["svdquant-int4", "svdquant-nvfp4", "w4a16-int4"]


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_quantizing_twice(recipe: str, calibrated: bool) -> None:
    """Also after other random numbers were drawn."""
    states = []
    for salt in range(2):
        model, inputs = MODELS["pixart"]()
        torch.manual_seed(salt)
        torch.rand(salt)
        nq.quantize(model, recipe, [inputs] if calibrated else None)
        states.append(state_of(model))
    assert differences(*states) == []


def test_prompts_twice() -> None:
    states = []
    for salt in range(2):
        pipe, _ = PIPELINES["flux_prompt"]()
        pipe.default_sample_size = SIZE
        torch.manual_seed(salt)
        data = [{"prompt": prompt, "max_sequence_length": TEXT} for prompt in ("a red cube", "the sea")]
        nq.quantize(pipe, QUICK, data=data, states=3)
        states.append(state_of(pipe.transformer))
    assert differences(*states) == []


def test_the_seed_matters_and_nothing_else_does() -> None:
    model = MODELS["pixart"]()[0]
    models = [copy.deepcopy(model) for _ in range(3)]
    for twin, seed in zip(models, (0, 0, 1), strict=True):
        nq.quantize(twin, QUICK, seed=seed)
    first, same, other = map(state_of, models)
    assert differences(first, same) == []
    assert differences(first, other) != []


def test_quantizing_leaves_the_global_generator_alone() -> None:
    model, inputs = MODELS["pixart"]()
    before = torch.get_rng_state()
    nq.quantize(model, QUICK, [inputs])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", ["rtn-int4", "rtn-nvfp4"])
@pytest.mark.parametrize("name", ["flux", "sdxl", "sana"])
def test_forward_twice(name: str, recipe: str) -> None:
    model, inputs = MODELS[name]()
    nq.quantize(model, recipe)
    for mode in ("a4", "a8", "a16"):
        nq.set_mode(model, mode)
        assert torch.equal(run(model, inputs), run(model, inputs)), mode
