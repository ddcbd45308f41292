"""The table of layer shapes is that of the models it names."""
from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from functools import cache

import diffusers
import pytest
from accelerate import init_empty_weights
from torch import nn

from benchmarks.shapes import CONFIGS, LAYERS, Layer, cases, small

PARAMETERS = {"flux": 11.9e9, "qwen": 20.4e9, "sd35": 8.06e9, "sdxl": 2.57e9}  # what the models' authors say


@cache
def model(name: str) -> nn.Module:
    cls, config = CONFIGS[name]
    small = {"pos_embed_max_size": 8, "sample_size": 8} if name == "sd35" else {}  # a table of constants, slow to make
    with init_empty_weights():
        return getattr(diffusers, cls)(**{**config, **small})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configurations_make_models_of_the_published_size(name: str) -> None:
    parameters = sum(parameter.numel() for parameter in model(name).parameters())
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.model}/{layer.name}")
def test_every_layer_occurs_as_often_as_it_says(layer: Layer) -> None:
    linears = {name: module for name, module in model(layer.model).named_modules() if isinstance(module, nn.Linear)}
    alike = [name for name, linear in linears.items() if fnmatchcase(name, layer.modules)
             and (linear.out_features, linear.in_features) == (layer.n, layer.k)]
    assert len(alike) == layer.count


@pytest.mark.parametrize("name", ("flux", "sdxl"))
def test_the_linears_of_all_blocks_are_there(name: str) -> None:
    """Of FLUX and SDXL the table holds every linear in the blocks."""
    listed = Counter({(layer.n, layer.k): 0 for layer in LAYERS})
    for layer in LAYERS:
        listed[layer.n, layer.k] += layer.count if layer.model == name else 0
    actual = Counter((module.out_features, module.in_features) for path, module in model(name).named_modules()
                     if isinstance(module, nn.Linear) and "transformer_blocks." in path)
    assert +listed == actual


def test_parts_cover_k() -> None:
    assert all(sum(layer.parts) == layer.k and all(k > 0 for k in layer.parts) for layer in LAYERS)


def test_cases_are_distinct_and_chosen_by_glob() -> None:
    found = cases(["flux/*"], (512,))
    assert len({(case.m, case.layer.n, case.layer.parts, case.layer.role == "down") for case in found}) == len(found)
    assert {case.m for case in found} == {512, 1024, 1536}
    assert [case.label for case in cases(["sdxl/1280.down"], (512, 1024))] == [
        "sdxl/1280.down 512²", "sdxl/1280.down 1024²"]
    assert not cases(["flux/*modulation"], (512,))


def test_small_cases_are_the_modulation_layers() -> None:
    found = small(["flux/*"], (1, 4))
    assert [(case.m, case.layer.n) for case in found] == [(1, 18432), (1, 9216), (4, 18432), (4, 9216)]
