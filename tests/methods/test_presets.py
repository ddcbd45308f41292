import dataclasses

import pytest

from nunchaku_py.errors import NunchakuError
from nunchaku_py.methods.error import output_error, run
from nunchaku_py.methods.smooth import SETS
from nunchaku_py.recipes import PRESETS, RECIPES, with_preset
from tests.methods.layers import CTX, small


def error(preset: str | None, fmt: str) -> float:
    recipe = with_preset(f"svdquant-{fmt}", preset)
    work, held_out = small(fmt, rank=8)
    context = dataclasses.replace(CTX, options=recipe.options)
    run(recipe.steps, work, context)
    return output_error(work, context, tokens=held_out)


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_fast_pays_with_error_and_best_costs_none(fmt):
    fast, usual, best = (error(preset, fmt) for preset in ("fast", None, "best"))
    assert fast > usual and best < 1.01 * usual


def test_a_preset_changes_options_and_what_calibration_collects():
    for name, recipe in RECIPES.items():
        assert with_preset(recipe, None) is recipe
        for preset in PRESETS:
            made = with_preset(name, preset)
            assert (made.name, made.format, made.rank, made.steps_data_free) == (
                recipe.name, recipe.format, recipe.rank, recipe.steps_data_free)
            assert made.options != recipe.options
    assert not with_preset("svdquant-int4", "fast").needs_gram and with_preset("svdquant-int4", "best").needs_gram
    assert with_preset("w4a16-int4", "fast").needs_gram


def test_sets_of_candidates_begin_with_none_and_hold_no_two_alike():
    assert len(SETS["many"]) == 39
    for found in SETS.values():
        assert found[0] == (0.0, 0.0) and len(set(found)) == len(found)


def test_an_unknown_preset_is_refused():
    with pytest.raises(NunchakuError, match="preset: expected fast or best, or none, got 'quick'"):
        with_preset("svdquant-int4", "quick")
