import dataclasses

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.methods.error import run
from nunchaku_py.methods.fit import fit
from nunchaku_py.methods.lowrank import lowrank
from nunchaku_py.methods.work import Stats
from nunchaku_py.recipes import RECIPES, Recipe, recipe_of
from tests.methods.layers import CTX, small


@pytest.mark.parametrize("data_free", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_and_repeats_bit_for_bit(name, gelu, data_free):
    recipe, results = RECIPES[name], []
    for _ in range(2):
        work, _ = small(recipe.format, gelu and recipe.kind == "w4a4", rank=min(recipe.rank, 8))
        work.site = dataclasses.replace(work.site, kind=recipe.kind)
        if data_free:
            work.stats = Stats.white(160, gelu, 0)
        results.append(run(recipe.steps_data_free if data_free else recipe.steps, work, CTX))
    first, second = results
    assert first.errors == second.errors and 0 < list(first.errors.values())[-1] < 0.5
    assert torch.equal(first.residual.codes, second.residual.codes) and torch.equal(first.up, second.up)


def test_w4a16_sites_pass_through_the_steps_of_w4a4_recipes():
    work, _ = small(rank=0, rows=50)
    work.site, work.stats.gram = dataclasses.replace(work.site, kind="w4a16"), None
    run(RECIPES["svdquant-int4"].steps, work, CTX)
    assert torch.equal(work.smooth, torch.ones(160)) and work.errors["fit"] == work.errors["refit"] < 0.12


def test_steps_out_of_order_are_refused():
    with pytest.raises(NunchakuError, match=r"got fit \(fit\), lowrank \(factor\)"):
        Recipe("odd", "int4", "w4a4", 8, (fit, lowrank), ())


def test_recipe_of():
    assert recipe_of("svdquant-int4").needs_gram and not recipe_of(RECIPES["rtn-nvfp4"]).needs_gram
    with pytest.raises(NunchakuError, match="recipe: expected one of svdquant-int4, .* got 'svdq'"):
        recipe_of("svdq")
