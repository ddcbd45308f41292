"""Recipes for random weights, where only the shape of the result matters: seconds instead of minutes a block."""
from __future__ import annotations

from dataclasses import replace

from ..methods.fit import absmax
from ..methods.lowrank import lowrank
from ..methods.work import Options
from ..recipes import RECIPES, Recipe

QUICK = tuple(replace(RECIPES[f"svdquant-{fmt}"], name=f"quick-{fmt}", steps_data_free=(lowrank, absmax),
                      options=Options(rounds=0, power=0)) for fmt in ("int4", "nvfp4"))
CHOICES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*QUICK, *RECIPES.values())}
