"""Recipes: named tuples of steps, each of a stage. The stages collect, probe, allocate and export are the quantizer's,
the others are made of the steps in `methods/`."""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .errors import NunchakuError
from .methods.fit import absmax, fit
from .methods.gptq import gptq
from .methods.lowrank import lowrank
from .methods.refit import refit
from .methods.smooth import smooth
from .methods.work import Options, Step

STAGES = ("collect", "probe", "allocate", "rewrite", "factor", "fit", "refine", "export")


@dataclass(frozen=True)
class Recipe:
    """How linears are quantized: `steps` with calibration data, `steps_data_free` without."""

    name: str
    format: Literal["int4", "nvfp4"]
    kind: Literal["w4a4", "w4a16"]
    rank: int
    steps: tuple[Step, ...]
    steps_data_free: tuple[Step, ...]
    options: Options = field(default_factory=Options)
    group: int | None = None  # weights per scale; None: the usual of the format, the one that fast kernels know

    def __post_init__(self) -> None:
        if self.group is not None and (self.format == "nvfp4" or self.group < 1):
            raise NunchakuError(f"recipe {self.name}: group is a number of int4 weights, "
                                f"got {self.group} for {self.format}")
        for steps in (self.steps, self.steps_data_free):
            order = [STAGES.index(step.stage) for step in steps]
            if order != sorted(order):
                found = ", ".join(f"{step.__name__} ({step.stage})" for step in steps)
                raise NunchakuError(f"recipe {self.name}: steps must be in the order of their stages, got {found}")

    def expect_rank(self, rank: int | None) -> None:
        """Only a step of the stage "factor" makes a branch."""
        factors = all(any(step.stage == "factor" for step in steps) for steps in (self.steps, self.steps_data_free))
        if rank and not factors:
            raise NunchakuError(f"rank: recipe {self.name} makes no low-rank branch, expected 0, got {rank}")

    @property
    def needs_gram(self) -> bool:
        """Whether calibration must collect E[xxᵀ]."""
        return gptq in self.steps


def _both(name: str, kind: Literal["w4a4", "w4a16"], rank: int, steps: tuple[Step, ...],
          data_free: tuple[Step, ...]) -> tuple[Recipe, ...]:
    return tuple(Recipe(f"{name}-{fmt}", fmt, kind, rank, steps, data_free) for fmt in ("int4", "nvfp4"))


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    *_both("svdquant", "w4a4", 32, (smooth, lowrank, fit, gptq, refit), (lowrank, fit, refit)),
    *_both("rtn", "w4a4", 0, (absmax,), (absmax,)),
    Recipe("w4a16-int4", "int4", "w4a16", 0, (fit, gptq), (fit,)),
)}


# Preset → what it changes of a recipe's options.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"candidates": "few", "search_rows": 512, "rounds": 6, "gain": 0.02, "patience": 1},
    "best": {"candidates": "many", "search_rows": 1 << 30, "rounds": 100, "gain": 0.0005, "patience": 4},
}


def with_preset(recipe: str | Recipe, preset: str | None) -> Recipe:
    """The recipe with the preset's options; "fast" leaves GPTQ out of W4A4 recipes, and so the Gram matrices."""
    recipe = recipe_of(recipe)
    if preset is None:
        return recipe
    if preset not in PRESETS:
        raise NunchakuError(f"preset: expected {' or '.join(PRESETS)}, or none, got {preset!r}")
    without = (gptq,) if preset == "fast" and recipe.kind == "w4a4" else ()
    return replace(recipe, options=replace(recipe.options, **PRESETS[preset]),
                   steps=tuple(step for step in recipe.steps if step not in without))


def recipe_of(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise NunchakuError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe]
