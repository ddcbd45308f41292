"""Our calibrated recipe beside the exact slow one: output error on held-out tokens, and time, layer by layer.

    python -m benchmarks.quality.slow_recipe [--only miniatures|block] [--out CSV]     rows, and the summary as Markdown
    python -m benchmarks.quality.slow_recipe --report [--out CSV]                      the summary alone, from the rows

The slow recipe is SVDQuant as published: 39 smoothing factors s = max|x|^α/max|w|^β, each tried with a full SVD,
plain rounding and the output error on the token sample, weights and activations quantized; then the alternation of
full SVD and rounding, up to 100 rounds, its error taken by running the layer, until that first grows. No GPTQ.

Layers: every W4A4 site of the trained miniatures, full SVDs throughout; and those of one FLUX block of real width,
random with outlier channels (synthetic.py). There the slow recipe's SVDs are by subspace iteration that has converged
(CONVERGED), so that its errors are known at all, and its time is what was measured without them, plus their number
times the lesser of a few full SVDs of that shape ("extrapolated"). Both recipes run in turn, in one process and on the
same threads. Their times are compared in CPU seconds, of all threads: other programs on the machine disturb these less
than the clock, which stands beside them.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.machine import ROOT, provenance
from benchmarks.quality.layer_table import site_of
from benchmarks.quality.picture_cells import Extent
from benchmarks.quality.picture_subjects import Subject
from benchmarks.quality.slow_report import write_report
from benchmarks.quality.synthetic import layer, stats_of
from benchmarks.rows import Origin, RowFile
from nunchaku_py.demo.measure import outputs
from nunchaku_py.engine import Engine, unit_weight
from nunchaku_py.methods.error import output_error, rounded
from nunchaku_py.methods.smooth import factor
from nunchaku_py.methods.svd import random_basis, truncated
from nunchaku_py.methods.work import Context, Work
from nunchaku_py.models.plan import Unit, plan
from nunchaku_py.recipes import RECIPES, with_preset

CSV = ROOT / "benchmarks/results/quality_slow_recipe.csv"
CANDIDATES = ((0.0, 0.0), *((k / 20, 0.0) for k in range(1, 20)), *((k / 20, 1 - k / 20) for k in range(1, 20)))
ROUNDS = 100
RANK, MINIATURE_RANK = 32, 16
CONVERGED = {"power": 4, "more": 32}  # residual within 0.05 % of the optimum on a flat spectrum, nearer on any other
PROBES = 2  # full SVDs of a shape that are timed where not all are made
ALL = 1 << 30
BLOCK = (("attn.to_out.0", 3072, 3072, False), ("attn.to_q, to_k, to_v", 9216, 3072, False),
         ("ff.net.2", 3072, 12288, True), ("ff.net.0.proj", 12288, 3072, False))
PRESETS = (None, "fast", "best")


@dataclass
class Row(Origin):
    source: str
    format: str
    layer: str
    n: int
    k: int
    rank: int
    preset: str  # of ours; "": none
    slow_error: float
    error: float
    error_ratio: float
    slow_seconds: float
    seconds: float
    time_ratio: float  # of CPU seconds
    slow_cpu_seconds: float
    cpu_seconds: float
    rounds: int  # of the slow alternation
    svds: int
    slow_tflop: float
    extrapolated: str  # "yes" where the time of full SVDs is a number times a median


class Case(NamedTuple):
    source: str
    name: str
    work: Callable[[], Work]
    held_out: Tensor
    full: bool  # whether all SVDs are full ones


@dataclass
class Clock:
    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@dataclass
class Slow:
    """The slow recipe on one work; counts what it does."""

    full: bool
    clock: Clock = field(default_factory=Clock)
    svd_clock: Clock = field(default_factory=Clock)
    svds: int = 0
    forwards: int = 0
    rounds: int = 0

    def run(self, work: Work, ctx: Context) -> None:
        with self.clock.running():
            tops, found = (work.stats.absmax.float(), work.weight.abs().amax(0).float()), []
            for alpha, beta in CANDIDATES:
                work.smooth = factor(*tops, alpha, beta, work, ctx)
                work.up, work.low = self.svd(work.smoothed(slice(None)), work.site.rank)
                found.append(self.error(work, ctx))
            work.smooth = factor(*tops, *CANDIDATES[found.index(min(found))], work, ctx)
            self.alternate(work, ctx)

    def alternate(self, work: Work, ctx: Context) -> None:
        what = work.smoothed(slice(None))
        target, kept = what, (float("inf"), None, None)
        for self.rounds in range(1, ROUNDS + 1):
            work.up, work.low = self.svd(target, work.site.rank)
            error = self.error(work, ctx)
            if error > kept[0]:
                break
            kept = error, work.up, work.low
            target = what - rounded(what - work.up @ work.low, work, ctx)
        _, work.up, work.low = kept

    def error(self, work: Work, ctx: Context) -> float:
        self.forwards += 1
        return output_error(work, ctx, enough=ALL)

    def svd(self, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        self.svds += 1
        with self.svd_clock.running():
            if self.full:
                return full_svd(a, rank)
            n, k = a.shape
            basis = random_basis(k, min(rank + CONVERGED["more"], n, k), 0, a)
            up, low, _ = truncated(lambda rows: a[rows], lambda: [slice(0, n)], n, basis, rank, CONVERGED["power"])
            return up, low

    def flop(self, n: int, k: int, tokens: int) -> float:
        """Of full SVDs with vectors (6mn² + 20n³, m ≥ n: Golub and Van Loan, R-SVD), and of forwards: y, and ŷ."""
        long, short = max(n, k), min(n, k)
        return self.svds * (6.0 * long * short**2 + 20.0 * short**3) + self.forwards * 4.0 * tokens * n * k


def full_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


# ------------------------------------------------------------------------------------------------- what is measured
def miniature(name: str, fmt: str) -> Iterator[Case]:
    """Its W4A4 sites, with what calibration states and held-out ones give their inputs."""
    subject = Subject(name, False, Extent(prompts=8, steps=3))
    model, engine = subject.denoiser, Engine(RECIPES[f"svdquant-{fmt}"], Context(), MINIATURE_RANK)
    units = [unit for unit in plan(model).units if unit.kind == "w4a4"]
    seen = inputs(model, units, subject.calibration(0))
    held_out = inputs(model, units, subject.states)
    for unit in units:
        weights = [unit_weight(model.get_submodule(name), unit) for name in unit.names]
        site = engine.site_of(unit, min(len(w) for w in weights), weights[0].shape[1])
        part = "" if unit.k_range is None else f"[{unit.k_range[0]}:{unit.k_range[1]}]"
        stats = stats_of(seen[unit])
        yield Case(name, f"{unit}{part}", lambda w=weights, s=site, t=stats, u=unit: Work.of(u.names, w, s, t),
                   held_out[unit], True)


def inputs(model: nn.Module, units: list[Unit], states: list) -> dict[Unit, Tensor]:
    """Every row that the first linear of each unit reads."""
    seen: dict[Unit, list[Tensor]] = {unit: [] for unit in units}

    def listen(unit: Unit):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            x = (x.movedim(-3, -1) if isinstance(module, nn.Conv2d) else x).flatten(0, -2).float()
            seen[unit].append(x if unit.k_range is None else x[:, slice(*unit.k_range)])
        return model.get_submodule(unit.names[0]).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [listen(unit) for unit in units]
    try:
        outputs(model, states)
    finally:
        for handle in handles:
            handle.remove()
    return {unit: torch.cat(found) for unit, found in seen.items()}


def block(fmt: str) -> Iterator[Case]:
    for name, n, k, gelu in BLOCK:
        data = layer(n, k, 0, gelu)
        weight, stats, held_out = data.weight.bfloat16(), stats_of(data.calibration), data.held_out
        del data
        yield Case("FLUX block", name, lambda w=weight, s=stats, g=gelu: Work.of(["layer"], [w],
                   site_of(fmt, g, RANK), s), held_out, False)


# ------------------------------------------------------------------------------------------------------- measuring
def ours(case: Case, fmt: str, preset: str | None) -> tuple[Clock, float]:
    work, recipe, clock = case.work(), RECIPES[f"svdquant-{fmt}"], Clock()
    recipe = recipe if preset is None else with_preset(recipe, preset)
    context = Context(options=recipe.options)
    with clock.running():
        for step in recipe.steps:
            step(work, context)
    return clock, output_error(work, context, tokens=case.held_out, enough=ALL)


def measure(case: Case, fmt: str, presets: tuple[str | None, ...]) -> Iterator[Row]:
    ours(case, fmt, None)  # what a first call costs is nobody's
    work, slow = case.work(), Slow(case.full)
    slow.run(work, Context())
    probes = [svd_probe(work) for _ in range(0 if case.full else PROBES)]
    wall, cpu = slow.clock.wall, slow.clock.cpu
    if probes:
        wall += slow.svds * sorted(p.wall for p in probes)[0] - slow.svd_clock.wall
        cpu += slow.svds * sorted(p.cpu for p in probes)[0] - slow.svd_clock.cpu
    slow_error = output_error(work, Context(), tokens=case.held_out, enough=ALL)
    n, k = work.weight.shape
    tokens = min(len(work.stats.tokens), Context().options.search_tokens)
    for preset in presets:
        clock, error = ours(case, fmt, preset)
        yield Row(**provenance(), source=case.source, format=fmt, layer=case.name, n=n, k=k, rank=work.site.rank,
                  preset=preset or "", slow_error=slow_error, error=error, error_ratio=error / slow_error,
                  slow_seconds=wall, seconds=clock.wall, time_ratio=cpu / clock.cpu, slow_cpu_seconds=cpu,
                  cpu_seconds=clock.cpu,
                  rounds=slow.rounds, svds=slow.svds, slow_tflop=slow.flop(n, k, tokens) / 1e12,
                  extrapolated="yes" if probes else "no")


def svd_probe(work: Work) -> Clock:
    clock = Clock()
    with clock.running():
        full_svd(work.smoothed(slice(None)), work.site.rank)
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("miniatures", "block"))
    parser.add_argument("--report", action="store_true", help="the summary alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", nargs="+", default=["int4"], choices=("int4", "nvfp4"))
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sources = {"miniatures": lambda fmt: (case for name in ("tiny-flux", "tiny-sdxl") for case in miniature(name, fmt)),
               "block": block}
    with torch.no_grad(), RowFile(args.out, Row) as file:
        for source, cases in sources.items():
            for fmt in args.formats if not args.report and args.only in (None, source) else ():
                for case in cases(fmt):
                    for row in measure(case, fmt, PRESETS):
                        file.write(row)
    print(write_report(args.out))


if __name__ == "__main__":
    main()
