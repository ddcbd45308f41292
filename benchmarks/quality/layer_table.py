"""Relative output error of one synthetic layer after each step of the recipes, on held-out tokens.

    python -m benchmarks.quality.layer_table                        the full table: 3072×3072, 5 seeds, CSV and page
    python -m benchmarks.quality.layer_table --size 768 --dry       a quick look
"""
from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quality.synthetic import Layer, layer, stats_of
from nunchaku_py.methods.error import output_error
from nunchaku_py.methods.smooth import smooth
from nunchaku_py.methods.work import Context, Stats, Work
from nunchaku_py.recipes import RECIPES
from nunchaku_py.site import Mode, Site

ROOT = Path(__file__).resolve().parents[2]
CSV, PAGE = ROOT / "benchmarks/results/quality_layer_table.csv", ROOT / "docs/quality.md"
SEEDS, RANKS = range(5), (0, 16, 32, 64)
GELU_SHIFT = 0.171875
LABELS = {"smooth": "+ smoothing", "lowrank": "+ rank {rank}", "fit": "+ scale search", "gptq": "+ GPTQ",
          "refit": "+ refit"}


@dataclass(frozen=True)
class Row:
    """One number: of one layer, after one step, in one activation mode."""

    site: str  # "linear" | "post-GELU"
    format: str
    rank: int
    method: str
    mode: str
    seed: int
    error: float
    seconds: float  # of the step


def site_of(fmt: str, gelu: bool, rank: int) -> Site:
    shifted = gelu and fmt == "int4"
    return Site("w4a4", fmt, 64 if fmt == "int4" else 16, rank, GELU_SHIFT if shifted else 0.0, shifted)


class Bench:
    """Measures works of one layer."""

    def __init__(self, data: Layer, gelu: bool, seed: int) -> None:
        self.data, self.gelu, self.seed = data, gelu, seed
        self.stats = stats_of(data.calibration)
        self.rows: list[Row] = []

    def work(self, fmt: str, rank: int, stats: Stats | None = None) -> Work:
        return Work.of(["layer"], [self.data.weight], site_of(fmt, self.gelu, rank), stats or self.stats)

    def note(self, work: Work, ctx: Context, method: str, mode: Mode = "a4", seconds: float = 0.0) -> None:
        error = output_error(work, ctx, mode, self.data.held_out)
        site = "post-GELU" if self.gelu else "linear"
        self.rows.append(Row(site, work.site.format, work.site.rank, method, mode, self.seed, error, seconds))

    def ladder(self, fmt: str, rank: int = 32) -> None:
        """RTN, smoothing alone, then every step of the recipe; the result in all three modes."""
        ctx = Context(seed=self.seed)
        alone = self.work(fmt, 0)
        self.note(alone, ctx, "RTN")
        smooth(alone, ctx)
        self.note(alone, ctx, LABELS["smooth"])
        work = self.work(fmt, rank)
        for step in RECIPES[f"svdquant-{fmt}"].steps:
            start = time.perf_counter()
            step(work, ctx)
            if step is not smooth:
                label = LABELS[step.__name__].format(rank=rank)
                self.note(work, ctx, label, seconds=time.perf_counter() - start)
        for mode in ("a4", "a8", "a16"):
            self.note(work, ctx, "SVDQuant", mode)

    def recipe(self, fmt: str, rank: int) -> None:
        ctx, work = Context(seed=self.seed), self.work(fmt, rank)
        for step in RECIPES[f"svdquant-{fmt}"].steps:
            step(work, ctx)
        self.note(work, ctx, "SVDQuant")

    def data_free(self, fmt: str, rank: int = 32) -> None:
        ctx = Context(seed=self.seed)
        work = self.work(fmt, rank, Stats.white(self.data.weight.shape[1], self.gelu, self.seed))
        for step in RECIPES[f"svdquant-{fmt}"].steps_data_free:
            step(work, ctx)
        for mode in ("a4", "a8", "a16"):
            self.note(work, ctx, "SVDQuant, data-free", mode)


def measure(size: int, seeds: Iterable[int] = SEEDS) -> list[Row]:
    rows: list[Row] = []
    for seed in seeds:
        for gelu in (False, True):
            bench = Bench(layer(size, size, seed, gelu, rows=4 * size), gelu, seed)
            for fmt in ("int4", "nvfp4"):
                bench.ladder(fmt)
                bench.data_free(fmt)
            for rank in RANKS if not gelu else ():
                if rank != 32:
                    bench.recipe("int4", rank)
            rows += bench.rows
    return rows


def pick(rows: list[Row], **wanted: object) -> list[float]:
    """Errors, by seed, of the rows that have these values."""
    return [row.error for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def summary(rows: list[Row]) -> list[dict[str, object]]:
    """Mean, spread and extremes over seeds, in the order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.site, row.format, row.rank, row.method, row.mode), []).append(row)
    out = []
    for key, found in groups.items():
        errors = [row.error for row in found]
        out.append(dict(zip(("site", "format", "rank", "method", "mode"), key, strict=True)) | {
            "error": statistics.mean(errors), "std": statistics.stdev(errors) if len(errors) > 1 else 0.0,
            "least": min(errors), "most": max(errors), "seeds": len(errors),
            "seconds": statistics.median(row.seconds for row in found)})
    return out


def markdown(rows: list[Row]) -> str:
    lines = ["| input | format | rank | method | activations | error % | ± | least – most |", "|---" * 8 + "|"]
    for s in summary(rows):
        mean, std, least, most = (f"{100 * s[name]:.2f}" for name in ("error", "std", "least", "most"))
        cells = (s["site"], s["format"], s["rank"], s["method"], s["mode"], mean, std, f"{least} – {most}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def provenance(size: int) -> dict[str, object]:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()
    dirty = "+" if git("status", "--porcelain", "--", "nunchaku_py/methods", "nunchaku_py/formats.py",
                       "nunchaku_py/tensor.py", "nunchaku_py/recipes.py", "benchmarks/quality") else ""
    return {"size": size, "device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
            "commit": git("rev-parse", "--short", "HEAD") + dirty, "torch": torch.__version__,
            "python": platform.python_version()}


def write_csv(path: Path, rows: list[Row], source: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [entry | source for entry in summary(rows)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()} for entry in table)


def write_page(path: Path, rows: list[Row], source: dict[str, object]) -> None:
    head, _, _ = path.read_text().partition("<!-- table -->") if path.exists() else ("# Quality\n\n", "", "")
    said = ", ".join(f"{name} {value}" for name, value in source.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}<!-- table -->\n\n{markdown(rows)}\n\nMeasured with: {said}.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=3072, help="N and K of the layer")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    source = provenance(args.size)  # now: the code that is loaded, not what the tree holds an hour later
    rows = measure(args.size, range(args.seeds))
    print(markdown(rows))
    if not args.dry:
        write_csv(CSV, rows, source)
        write_page(PAGE, rows, source)


if __name__ == "__main__":
    main()
