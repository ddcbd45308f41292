"""From planned units to quantized modules: shared by quantizing at once, block by block, and while loading.

A job is the smallest thing that is quantized at once: the units (linears sharing an input, or K-parts) whose modules
belong together.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .errors import NunchakuError
from .fold_report import fold_error
from .formats import format_of
from .linear import COMPUTE_DTYPES
from .methods.error import output_error, run
from .methods.export import export
from .methods.work import Context, Stats, Work
from .models.plan import Plan, Unit
from .recipes import Recipe
from .report import SiteRow
from .site import Site, SiteTensors
from .split_linear import SplitLinear
from .swap import Entry, Quantized, empty_module, module_shape

A8_CHUNKS = 3  # of a weight, on which the error in a8 is measured: in 1.6 % of the time of a 3072×3072 linear
GELU_SHIFT = 0.171875  # −min of GELU, exact in bf16: post-GELU inputs become non-negative
Part = tuple[Unit, SiteTensors, Site]


@dataclass(frozen=True)
class Job:
    """Modules that are quantized together, and the units they consist of."""

    block: str
    names: tuple[str, ...]
    units: tuple[Unit, ...]


def jobs_of(plan: Plan) -> list[Job]:
    """Units that share a module belong to one job; order of execution is kept."""
    groups: list[tuple[set[str], list[Unit]]] = []
    for unit in plan.units:
        touching = [group for group in groups if group[0] & set(unit.names)]
        merged = (set(unit.names).union(*(names for names, _ in touching)),
                  [u for _, units in touching for u in units] + [unit])
        groups = [group for group in groups if group not in touching] + [merged]
    return [Job(units[0].block, tuple(dict.fromkeys(name for unit in units for name in unit.names)), tuple(units))
            for _, units in groups]


@dataclass(frozen=True)
class Engine:
    """A recipe with its settings, applied job by job."""

    recipe: Recipe
    context: Context
    rank: int | None = None  # None: the recipe's, cut to what a small layer allows

    def site_of(self, unit: Unit, n: int, k: int) -> Site:
        fmt = self.recipe.format if unit.kind == "w4a4" else "int4"  # modulation is int4 in NVFP4 models too
        shifted = unit.gelu and unit.kind == "w4a4" and fmt == "int4"
        group = self.recipe.group if self.recipe.group and fmt == self.recipe.format else format_of(fmt).group
        return Site(unit.kind, fmt, group, self._rank(unit, n, k),
                    GELU_SHIFT if shifted else 0.0, shifted)

    def _rank(self, unit: Unit, n: int, k: int) -> int:
        if unit.kind == "w4a16":
            return 0
        if self.rank is not None and self.rank > min(n, k):
            raise NunchakuError(f"{unit.names[0]}: rank {self.rank} exceeds min(N, K) = {min(n, k)}; "
                                f"lower the rank, or keep this linear by a rule")
        return min(self.recipe.rank if self.rank is None else self.rank, n, k)

    def check(self, jobs: Iterable[Job], model: nn.Module) -> None:
        """Refuse what cannot be quantized before anything is changed."""
        self.check_shapes(jobs, model)
        self.check_weights(jobs, model)

    def check_shapes(self, jobs: Iterable[Job], model: nn.Module) -> None:
        """The part of it for which no weight need be in memory."""
        for unit in (unit for job in jobs for unit in job.units):
            weights = [unit_weight(model.get_submodule(name), unit) for name in unit.names]
            self.site_of(unit, min(w.shape[0] for w in weights), weights[0].shape[1])

    def check_weights(self, jobs: Iterable[Job], model: nn.Module) -> None:
        for name in (name for job in jobs for name in job.names):
            _check_weight(name, model.get_submodule(name))

    def run(self, job: Job, modules: Mapping[str, nn.Module], stats: Mapping[Unit, Stats]
            ) -> tuple[dict[str, Quantized], list[SiteRow]]:
        """Quantize a job's modules; a unit without statistics is quantized data-free."""
        parts: dict[str, list[Part]] = {name: [] for name in job.names}
        rows: list[SiteRow] = []
        for unit in job.units:
            work = self._work(unit, modules, stats.get(unit))
            work.errors["before"] = output_error(work, self.context)
            run(self.recipe.steps_data_free if work.stats.synthetic else self.recipe.steps, work, self.context)
            a8 = None  # modulation has no such mode, and without data nothing is known of activations
            if work.site.kind == "w4a4" and not work.stats.synthetic:
                a8 = output_error(work, self.context, "a8", enough=A8_CHUNKS)
            for name, tensors in zip(unit.names, export(work, self.context), strict=True):
                parts[name].append((unit, tensors, work.site))
                rows.append(_row(name, unit, work, tensors, modules[name], a8))
        dtype = self.context.scale_dtype
        return {name: assemble(name, modules[name], found, dtype) for name, found in parts.items()}, rows

    def _work(self, unit: Unit, modules: Mapping[str, nn.Module], stats: Stats | None) -> Work:
        weights = [unit_weight(modules[name], unit) for name in unit.names]
        n, k = min(w.shape[0] for w in weights), weights[0].shape[1]
        if stats is None:
            stats = Stats.white(k, unit.gelu, self.context.seed, weights[0].device)
        if unit.gelu and stats.tokens.min() < -GELU_SHIFT:  # the shift would not make it positive, and cut it off
            self.context.log(f"{unit}: is taken for the output of a GELU, but its input reaches below; not shifted")
            unit = replace(unit, gelu=False)
        return Work.of(unit.names, weights, self.site_of(unit, n, k), stats)


def unit_weight(module: nn.Module, unit: Unit) -> Tensor:
    """(N,K) of a linear or 1×1 convolution, or the unit's columns of it."""
    weight = module.weight.detach().flatten(1)
    return weight if unit.k_range is None else weight[:, unit.k_range[0]:unit.k_range[1]]


def assemble(name: str, old: nn.Module, parts: Sequence[Part], dtype: torch.dtype) -> Quantized:
    """The quantized module of `old` from its site, or from its K-parts in order of their columns."""
    parts = sorted(parts, key=lambda part: part[0].k_range or (0, 0))
    bias = _summed_bias(old, parts, dtype)
    split = parts[0][0].k_range is not None
    entry: Entry = tuple((unit.k_range, site) for unit, _, site in parts) if split else parts[0][2]
    module = empty_module(old, entry, bias is not None, dtype)
    targets = list(module.parts) if isinstance(module, SplitLinear) else [module]
    for target, (_, tensors, _) in zip(targets, parts, strict=True):
        tensors.bias = None if split else bias
        target.set_tensors(tensors, name)
        target.compute_dtype = old.weight.dtype
    if isinstance(module, SplitLinear) and bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _summed_bias(old: nn.Module, parts: Sequence[Part], dtype: torch.dtype) -> Tensor | None:
    """The linear's bias plus what export gave each shifted part (its correction, as it was told of no bias).

    With a correction it stays in fp32: modes that do not shift take that off again."""
    terms = [tensors.bias.float() for _, tensors, _ in parts if tensors.bias is not None]
    if not terms:
        return None if old.bias is None else old.bias.detach().to(dtype)
    return sum(terms, torch.zeros_like(terms[0]) if old.bias is None else old.bias.detach().float())


def _check_weight(name: str, module: nn.Module) -> None:
    for leaf, tensor in module.named_parameters(recurse=False):
        if tensor.is_meta:
            raise NunchakuError(f"{name}.{leaf}: has no data (meta device); load the weights, and quantize before "
                                f"enabling offload")
        if tensor.dtype not in COMPUTE_DTYPES:
            raise NunchakuError(f"{name}.{leaf}: expected float32, bfloat16 or float16, got {str(tensor.dtype)[6:]}")
        if not torch.isfinite(tensor).all():
            raise NunchakuError(f"{name}.{leaf}: holds NaN or infinite values")


def _row(name: str, unit: Unit, work: Work, tensors: SiteTensors, old: nn.Module, a8: float | None) -> SiteRow:
    n, k = module_shape(old)[0], work.weight.shape[1]
    before = n * k * old.weight.element_size()
    after = sum(tensor.numel() * tensor.element_size() for tensor in tensors.named().values())
    return SiteRow(name, work.site.kind, work.site.format, work.site.rank, n, k, unit.k_range, before, after,
                   "data-free" if work.stats.synthetic else "calibrated", dict(work.errors), a8,
                   fold_error(tensors.weight) if work.site.kind == "w4a4" else None)


