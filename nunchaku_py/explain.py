"""Why a quantized model runs the way it does: how many sites in which mode, and what a8's fold changes in weights; for
each kind of site the backend it runs on, and why others refuse; for each pattern that runs modules together where it
holds, and why not elsewhere."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from . import ops
from .attention_backend import attention_lines
from .errors import NunchakuError
from .fold_report import fold_errors
from .fusion import modules_of
from .linear import QuantizedSite
from .mode_lines import mode_lines
from .models.pattern import pattern_of
from .module_tools import adapted_layers, in_place, used_on
from .offload import offload_lines
from .report import fold_lines
from .swap import quantized_components, quantized_sites
from .tables import table_lines


@dataclass(frozen=True)
class Explanation:
    """One op as `sites` linears of a model call it."""

    op: str
    call: str
    sites: int
    backend: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        return f"{self.op} ({self.call}), {self.sites} sites: runs on {self.backend}" + (f" — {why}" if why else "")


@dataclass(frozen=True)
class PatternUse:
    """In how many of the modules that a pattern concerns it is used, and why it is not in so many others."""

    name: str
    used: int
    refusals: dict[str, int]

    def __str__(self) -> str:
        modules = self.used + sum(self.refusals.values())
        return "; ".join([f"{self.name}: used by {self.used} of {modules}",
                          *(f"not by {count}: {reason}" for reason, count in self.refusals.items())])


class Explanations(list[Explanation]):
    """A list that prints one sentence a line, those of modes, offloading and the fold before it; then those of the
    patterns, of the adapters that are on, of modulation tables, and of attention where it is set to a backend of ours.
    folds: what folding to INT8 changes in each weight that is made for 4-bit activations, relative to it; of several
    models with the component's name in front."""

    modes: list[str]
    offload: list[str]
    folds: dict[str, float]
    patterns: list[PatternUse]
    adapters: list[str]
    tables: list[str]
    attention: list[str]

    def __str__(self) -> str:
        fold = fold_lines(list(self.folds.values()))
        return "\n".join(map(str, [*self.modes, *self.offload, *fold, *self, *self.patterns, *self.adapters,
                                   *self.tables, *self.attention]))


@torch.no_grad()
def explain(target: object, rows: int = 64) -> Explanations:
    """What each distinct call of a model's (or pipeline's) quantized linears runs on, for inputs of so many rows."""
    kinds: dict[tuple[str, int, int, str], list[QuantizedSite]] = {}
    components = quantized_components(target)
    models = list(components.values())
    for site in (site for model in models for site in quantized_sites(model)):
        with in_place(site):
            if not site.has_data():
                raise NunchakuError("explain: the model has no weights here (meta device); load it, or remove "
                                    "offloading")
            site.pack()
        if site.table is not None and site.table.is_away(site):  # it runs on another device than where it is now
            continue
        key = (site.linear_spec.token, site.rows_out, site.site.rank, str(used_on(site)))
        kinds.setdefault(key, []).append(site)
    found = Explanations()
    for sites in kinds.values():
        with in_place(sites[0]):
            found += _explain_site(sites[0], len(sites), rows)
    found.modes, found.offload = mode_lines(models), offload_lines(models)
    found.folds = {(f"{component}.{name}" if len(models) > 1 else name): error
                   for component, model in components.items() for name, error in fold_errors(model).items()}
    found.patterns, found.adapters = _explain_patterns(models), _explain_adapters(models)
    found.tables = table_lines(models)
    found.attention = [line for model in models for line in attention_lines(model)]
    return found


def _explain_adapters(models: Iterable[nn.Module]) -> list[str]:
    """How the active ones run: in the quantized linears, or beside them and why."""
    ways = Counter((" + ".join(layer.active()), layer.why_beside() or "") for model in models
                   for layer in adapted_layers(model) if layer.active())
    return [f"adapters {names}: " + (f"beside {count} linears: {why}" if why else f"in the branch of {count} linears")
            for (names, why), count in ways.items()]


def _explain_patterns(models: Iterable[nn.Module]) -> list[PatternUse]:
    answers: dict[str, Counter[str | None]] = {}
    for model in models:
        for fusion, module in modules_of(model, pattern_of(model).fusions):
            answers.setdefault(fusion.name, Counter())[fusion.refuses(module)] += 1
    return [PatternUse(name, count.pop(None, 0), dict(count)) for name, count in answers.items()]


@torch.no_grad()
def _explain_site(site: QuantizedSite, count: int, rows: int) -> list[Explanation]:
    x = torch.zeros(rows, site.rows_in, dtype=site.compute_dtype, device=site.codes.device)
    quantized = site.quantize_input(x)
    spec = site.linear_spec
    shape = f"{rows}x{site.rows_in} -> {site.rows_out}, {spec.act.format} x {spec.weight}"
    calls = [site.product(quantized, x.dtype)]
    if site.site.has_smooth:
        calls.insert(0, ops.Call(ops.quantize_act, (x, site.inv_smooth, site.branch(x.dtype)[0], spec.act)))
    found = [_explain_call(op, args, shape, count) for op, args in calls]
    why = site.why_not_mma() if spec.act.format in ("int4", "uint4", "nvfp4") else None
    for explanation in found if why else ():
        explanation.refusals["cuda"] = why
    return found


def _explain_call(op: ops.Op, args: tuple, shape: str, count: int) -> Explanation:
    answers = op.explain(*args)
    able = [name for name, answer in answers.items() if answer == "can run"]
    refusals = {name: answer for name, answer in answers.items() if answer != "can run"}
    return Explanation(op.name, shape, count, able[0] if able else "nothing", refusals)

