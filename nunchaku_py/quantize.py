"""quantize(target, recipe, data): plan, calibrate block by block or not at all, quantize, swap.

In place, or not at all: whatever goes wrong or is interrupted, the model is left as it was.
"""
from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .calibrate import State, capture_states
from .collect import SiteTap
from .engine import Engine, Job, jobs_of
from .errors import NunchakuError
from .folders import DENOISERS
from .methods.work import Context, Stats
from .mode_lines import mode_lines
from .models.discover import linears_in
from .models.plan import Plan, Unit, plan
from .precision import without_autocast
from .progress import Progress
from .recipes import Recipe, recipe_of
from .replay import replay
from .report import Report, SiteRow, merged
from .residence import Residence
from .resume import FinishedBlocks, fingerprint
from .site import MODES
from .swap import Quantized, prepare, quantized_sites, replace_modules

AnyRun = TypeVar("AnyRun", bound="Run")


def quantize(target: Any, recipe: str | Recipe = "svdquant-int4", data: Any = None, mode: str = "auto", *,
             rank: int | None = None, rules: Mapping[str, str] | None = None,
             components: Sequence[str] | Mapping[str, str | Recipe] | None = None, states: int = 16,
             feedback: bool = True, work_dir: str | os.PathLike[str] | None = None, keep_work: bool = False,
             progress: bool | None = None, seed: int = 0) -> Report:
    """Quantize a pipeline's denoiser(s), or a model, in place, and report what was done.

    data: None (data-free), a list of prompts (pipelines), an iterable of forward kwargs, or a callable that takes the
    model and runs it. rules: {glob of module names: "w4a4" | "w4a16" | "keep"}, over the architecture's own; a later
    rule overrides an earlier one. components: which of a pipeline's models, optionally with a recipe each. states: how
    many (prompt, timestep) states to calibrate on. feedback: let every block see what the quantized blocks before it
    give. work_dir: a folder for finished blocks, so that an interrupted run goes on from there; emptied at the end,
    unless keep_work leaves that to the caller, who may first want to have saved the result.
    """
    if mode != "auto" and mode not in MODES:
        raise NunchakuError(f"mode: expected 'auto', 'a4', 'a8' or 'a16', got {mode!r}")
    pipeline = None if isinstance(target, nn.Module) else target
    settings = Settings(rank, rules or {}, mode, seed)
    runs = runs_of(_components(target, recipe, components), settings, _prepare)
    found = {name: None if data is None else capture_states(pipeline or run.model, run.model, data, states, seed=seed,
                                                            show=progress) for name, run in runs.items()}
    reports: dict[str, Report] = {}
    try:
        for name, run in runs.items():
            folder = None if work_dir is None else os.path.join(work_dir, name) if len(runs) > 1 else work_dir
            reports[name] = run.run(found[name], feedback, folder, progress)
    except BaseException:
        for name in reports:
            runs[name].undo()
        raise
    for run in runs.values():
        if run.finished is not None and not keep_work:
            run.finished.delete(run.blocks)
    return merged(reports)


@dataclass(frozen=True)
class Settings:
    """What all components of a run share."""

    rank: int | None = None
    rules: Mapping[str, str] = field(default_factory=dict)
    mode: str = "auto"
    seed: int = 0


def runs_of(chosen: Mapping[str, tuple[nn.Module, str | Recipe]], settings: Settings,
            prepare_run: Callable[[str, nn.Module, Recipe, Settings], AnyRun]) -> dict[str, AnyRun]:
    """A run for each component, all of them checked before any is changed. A rule must match in one of them."""
    linears = {name: list(linears_in(model)) for name, (model, _) in chosen.items()}

    def matches(glob: str, name: str) -> bool:
        return any(fnmatchcase(linear, glob) for linear in linears[name])

    single, rules = len(chosen) == 1, settings.rules
    for glob in rules:
        if not single and not any(matches(glob, name) for name in chosen):
            raise NunchakuError(f"rule {glob!r}: no linear or 1×1 convolution of {', '.join(chosen)} has such a name")
    own = {name: {glob: rules[glob] for glob in rules if single or matches(glob, name)} for name in chosen}
    return {name: prepare_run(name, model, recipe_of(recipe), replace(settings, rules=own[name]))
            for name, (model, recipe) in chosen.items()}


def _prepare(_name: str, model: nn.Module, recipe: Recipe, settings: Settings) -> Run:
    run = Run(*planned(model, recipe, settings), mode=settings.mode)
    run.engine.check(run.jobs, model)
    return run


def planned(model: nn.Module, recipe: Recipe, settings: Settings
            ) -> tuple[nn.Module, Engine, Plan, list[Job], torch.dtype]:
    """What a run begins with."""
    recipe.expect_rank(settings.rank)
    decided = plan(model, recipe.kind, settings.rules)
    if not decided.units:
        reason = next(iter(decided.kept.values()))
        raise NunchakuError(f"{type(model).__name__}: nothing is left to quantize, it would keep all its "
                            f"{len(decided.kept)} linears in 16 bit ({reason}, …)")
    dtype = model_dtype(model, decided)
    engine = Engine(recipe, context_of(recipe, dtype, settings.seed), settings.rank)
    return model, engine, decided, jobs_of(decided), dtype


def context_of(recipe: Recipe, dtype: torch.dtype | None, seed: int = 0) -> Context:
    scale_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return Context(scale_dtype=scale_dtype, seed=seed, options=recipe.options,
                   log=logging.getLogger("nunchaku_py").info)


@dataclass
class Run:
    """One model on its way; `modules` gathers the quantized ones, `originals` what they replace."""

    model: nn.Module
    engine: Engine
    plan: Plan
    jobs: list[Job]
    dtype: torch.dtype
    modules: dict[str, Quantized] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    rows: list[SiteRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: FinishedBlocks | None = None
    mode: str = "auto"
    residence: Residence | None = None  # None: the model as a whole is where it is to be computed

    def run(self, states: Sequence[State] | None, feedback: bool, work_dir: str | os.PathLike[str] | None,
            progress: bool | None) -> Report:
        """Quantize in place; states None: data-free."""
        started, before = time.monotonic(), model_bytes(self.model)
        self.open(work_dir, states or (), feedback)
        with torch.no_grad():
            if states is None:
                self.data_free(progress)
            else:
                self.calibrated(states, feedback, progress)
        return self.finish(before, started)

    def open(self, work_dir: str | os.PathLike[str] | None, states: Sequence[State], feedback: bool) -> None:
        """Look for finished blocks of the same run: the same model, recipe, options and calibration states."""
        if work_dir is None:
            return
        recipe, context, rank = self.engine.recipe, self.engine.context, self.engine.rank
        settings = {"model": type(self.model).__name__, "recipe": recipe.name, "format": recipe.format,
                    "rank": recipe.rank if rank is None else rank, "group": recipe.group, "seed": context.seed,
                    "steps": [step.__name__ for step in (*recipe.steps, *recipe.steps_data_free)],
                    "options": repr(context.options), "units": repr(self.plan.units), "states": fingerprint(states),
                    "feedback": feedback, "mode": self.mode if feedback else "any"}
        self.finished = FinishedBlocks(work_dir, settings)

    @property
    def blocks(self) -> dict[str, list[Job]]:
        """Block name → jobs; a linear outside the blocks, which only a rule chooses, is a block of its own."""
        found: dict[str, list[Job]] = {}
        for job in self.jobs:
            found.setdefault(job.block or job.names[0], []).append(job)
        return found

    @property
    def kept_blocks(self) -> list[str]:
        """Blocks that stay in 16 bit, where these are in memory one at a time, too."""
        return []

    def cost(self, block: str) -> int:
        """Work is close to proportional to the number of weights."""
        return sum(self.model.get_submodule(name).weight.numel() for job in self.blocks[block] for name in job.names)

    def data_free(self, progress: bool | None) -> None:
        costs = {block: self.cost(block) for block in self.blocks}
        with Progress(sum(costs.values()), "quantizing", progress) as bar:
            for block, cost in costs.items():
                bar.say(block)
                with self.resident(block):
                    self.quantize_block(block, {})
                bar.advance(cost)

    def resident(self, block: str) -> AbstractContextManager[None]:
        return nullcontext() if self.residence is None else self.residence.of(block)

    def calibrated(self, states: Sequence[State], feedback: bool, progress: bool | None) -> None:
        """Replay a few captured forwards block by block; with feedback each block sees the quantized ones' output."""
        blocks = {block: self.model.get_submodule(block) for block in (*self.blocks, *self.kept_blocks)}
        with Progress(sum(map(self.cost, self.blocks)), "quantizing", progress) as bar:

            def finish(block: str, stats: dict[Unit, Stats]) -> None:
                if block not in self.blocks:
                    return
                self.note_uncalled(block, stats)
                made = self.quantize_block(block, stats)
                if feedback:
                    replace_modules(self.model, made)
                bar.advance(self.cost(block))

            try:
                unreached = replay(self.model, blocks, states, self.taps_of, finish, feedback=feedback, progress=bar,
                                   residence=self.residence)
                for block, reason in unreached.items():
                    if block not in self.blocks:
                        continue
                    self.notes.append(f"{block}: {reason}, so it is quantized data-free")
                    with self.resident(block):
                        self.quantize_block(block, {})
            except BaseException:
                replace_modules(self.model, self.originals)
                raise

    def note_uncalled(self, block: str, stats: Mapping[Unit, Stats]) -> None:
        self.notes += [f"{unit.names[0]}: no calibration forward calls it, so it is quantized data-free"
                       for unit in self.taps_of(block) if unit not in stats]

    def taps_of(self, block: str) -> dict[Unit, SiteTap]:
        """The first member of each unit is listened to; nothing, where the finished block lies on disk."""
        if self.finished is not None and self.finished.has(block):
            return {}
        return {unit: SiteTap(self.model.get_submodule(unit.names[0]), unit.k_range, self.engine.recipe.needs_gram)
                for job in self.blocks.get(block, ()) for unit in job.units}

    def quantize_block(self, block: str, stats: Mapping[Unit, Stats]) -> dict[str, Quantized]:
        """The block's quantized modules, from the folder of finished blocks or made now."""
        jobs = self.blocks[block]
        originals = {name: self.model.get_submodule(name) for job in jobs for name in job.names}
        known = self.finished.read(block, originals, self.engine.context.scale_dtype) if self.finished else None
        if known is None:
            modules, rows = {}, []
            with without_autocast(next(iter(originals.values())).weight.device.type):
                for job in jobs:
                    made, job_rows = self.engine.run(job, originals, stats)
                    modules |= made
                    rows += job_rows
            known = modules, rows
            if self.finished is not None:
                self.finished.write(block, originals, known)
        for module in known[0].values():
            for site in quantized_sites(module):
                site.set_mode(self.mode, now=False)
        self.originals |= originals
        self.modules |= known[0]
        self.rows += known[1]
        return known[0]

    def finish(self, before: int, started: float) -> Report:
        """Put everything in place; if that fails or is interrupted, put everything back."""
        try:
            replace_modules(self.model, self.modules)
            report = self.report(before, time.monotonic() - started)
            attach(self.model, report)
            prepare(self.model)
            for site in quantized_sites(self.model):
                site.pack()
            report.modes = mode_lines([self.model])
        except BaseException:
            self.undo()
            raise
        return report

    def undo(self) -> None:
        """Make the model what it was."""
        replace_modules(self.model, self.originals)
        unattach(self.model)

    def report(self, before: int, seconds: float) -> Report:
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        rows = sorted(self.rows, key=lambda row: (order[row.name], row.k_range or (0, 0)))
        groups = [list(unit.names) for unit in self.plan.units if len(unit.names) > 1]
        return Report(self.engine.recipe.name, rows, dict(self.plan.kept), groups, before, model_bytes(self.model),
                      seconds, self.notes, self.dtype)


class StreamingQuantizer:
    """Data-free quantization while a model is being loaded: a job runs as soon as the last of its weights is there."""

    def __init__(self, model: nn.Module, config: Any, dtype: torch.dtype | None) -> None:
        self.model, self.started = model, time.monotonic()
        recipe = recipe_of(config.recipe)
        decided = plan(model, recipe.kind, config.rules or {})
        self.before = model_bytes(model)
        engine = Engine(recipe, context_of(recipe, dtype), config.rank)
        self.run = Run(model, engine, decided, jobs_of(decided), dtype or torch.float32)
        self.job_of = {name: job for job in self.run.jobs for name in job.names}

    def wants(self, parameter: str) -> bool:
        name, _, leaf = parameter.rpartition(".")
        return name in self.job_of and leaf in ("weight", "bias")

    @torch.no_grad()
    def put(self, parameter: str, value: Tensor) -> None:
        """Take one weight or bias; once its job is complete, quantize and replace the job's modules."""
        name, _, leaf = parameter.rpartition(".")
        self.model.get_submodule(name)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        job = self.job_of[name]
        waiting = [p for member in job.names for p in self.model.get_submodule(member).parameters() if p.is_meta]
        if waiting:
            return
        self.run.engine.check([job], self.model)
        modules, rows = self.run.engine.run(job, {member: self.model.get_submodule(member) for member in job.names}, {})
        self.run.modules |= modules
        self.run.rows += rows
        replace_modules(self.model, modules)

    def finish(self) -> Report:
        missing = [name for name in self.job_of if name not in self.run.modules]
        if missing:
            raise NunchakuError(f"{missing[0]}.weight: missing in the checkpoint ({len(missing)} such linears)")
        return self.run.report(self.before, time.monotonic() - self.started)


def attach(model: nn.Module, report: Report) -> None:
    """Tell diffusers or transformers, whichever the model is of, that it is quantized, so that it saves and reloads."""
    if hasattr(model, "register_to_config"):
        from .diffusers_hook import SVDQuantConfig, attach_config

        attach_config(model, SVDQuantConfig(), report)
    elif hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from .transformers_hook import attach_text

        attach_text(model, report)


def unattach(model: nn.Module) -> None:
    """Undo `attach`."""
    if hasattr(model, "register_to_config"):
        from .diffusers_hook import detach

        detach(model)
    elif hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from .transformers_hook import detach_text

        detach_text(model)


def model_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def model_dtype(model: nn.Module, planned: Plan) -> torch.dtype:
    """The dtype of the linears to be quantized."""
    return model.get_submodule(planned.units[0].names[0]).weight.dtype


def _components(target: Any, recipe: str | Recipe, components: Sequence[str] | Mapping[str, str | Recipe] | None
                ) -> dict[str, tuple[nn.Module, str | Recipe]]:
    """Component name → (model, recipe); a bare model has the name ""."""
    if isinstance(target, nn.Module):
        if components is not None:
            raise NunchakuError("components: only a pipeline has components, this is a model")
        return {"": (target, recipe)}
    held = getattr(target, "components", None)
    if not isinstance(held, dict):
        raise NunchakuError(f"quantize takes a model or a diffusers pipeline, not {type(target).__name__}")
    if components is None:
        components = [name for name in DENOISERS if isinstance(held.get(name), nn.Module)]
        if not components:
            raise NunchakuError(f"{type(target).__name__} has no transformer or unet; name its components")
    wrong = [name for name in components if not isinstance(held.get(name), nn.Module)]
    if wrong:
        models = [name for name, part in held.items() if isinstance(part, nn.Module)]
        raise NunchakuError(f"components: {wrong[0]!r} is not a model of this pipeline; it has {', '.join(models)}")
    recipes = components if isinstance(components, Mapping) else {}
    return {name: (held[name], recipes.get(name, recipe)) for name in components}
