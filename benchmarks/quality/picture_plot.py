"""The plot of benchmarks.quality.pictures: errors of every method, and the PSNR of pictures, for each model."""
from __future__ import annotations

import statistics
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.quality.picture_bars import Table
from benchmarks.quality.picture_cells import EXACT, FREE, METHODS, RANK, RANKS, SIXTEEN
from benchmarks.quality.picture_rows import Row

# What is drawn as a line: (format, mode) → colour, style
LINES = {("int4", "a4"): ("C0", "-"), ("int4", "a8"): ("C0", "--"), ("int4", "a16"): ("C0", ":"),
         ("nvfp4", "a4"): ("C2", "-"), ("nvfp4", "a8"): ("C2", "--"), ("nvfp4", "a16"): ("C2", ":")}
# Along the axis: the methods at one rank, then the shipped one at every rank.
PLACES = [*((method, 0 if method in ("rtn", "smooth") else RANK) for method in METHODS if method != "svdquant"),
          *(("svdquant", rank) for rank in RANKS)]
PICTURED = {"rtn": "0.6", "smooth": "0.45", "svdquant": "C0", "sdnq uint4": "C3"}


def draw(table: Table, path: Path) -> str | None:
    """None, or what is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        return f"{missing.name} is not installed, and draws the plot: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects = table.subjects()
    figure, axes = pyplot.subplots(len(subjects), 2, figsize=(14, 4.2 * len(subjects)), squeeze=False, dpi=90,
                                   width_ratios=(1.5, 1))
    for (left, right), (model, stress) in zip(axes, subjects, strict=True):
        draw_errors(left, table, model, stress)
        draw_psnr(right, table, model, stress)
    figure.tight_layout()
    figure.savefig(path, pil_kwargs={"optimize": True})
    pyplot.close(figure)
    return None


def draw_errors(axes: Any, table: Table, model: str, stress: str) -> None:
    from matplotlib.ticker import LogLocator

    for (fmt, mode), (colour, style) in LINES.items():
        same = {"model": model, "stress": stress, "format": fmt, "mode": mode}
        found = [list(table.errors(**same, method=method, rank=rank).values()) for method, rank in PLACES]
        there = [place for place, errors in enumerate(found) if errors]
        means = [100 * statistics.mean(found[place]) for place in there]
        if there:
            axes.plot(there, means, style, color=colour, marker="o", markersize=4, label=f"{fmt} {mode}")
        single = [(place, 100 * error) for place in there for error in found[place]]
        axes.plot([place for place, _ in single], [error for _, error in single], ".", color=colour, alpha=0.3)
    draw_levels(axes, table, model, stress)
    labels = [method if method in ("rtn", "smooth") else f"{method}\nrank {rank}" for method, rank in PLACES]
    axes.set_xticks(range(len(PLACES)), labels, fontsize=7, rotation=35)
    axes.set_xlim(-0.5, len(PLACES) - 0.5)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_ylabel("error of the denoiser's output, %")
    axes.set_title(f"{model}, {stress}: along the 16-bit trajectory", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=6, ncols=2)


def draw_levels(axes: Any, table: Table, model: str, stress: str) -> None:
    """A line across for what sees no data, sdnq and ours, and for what 16-bit rounding alone does."""
    levels = [(row, "C3", f"{row.method} {row.settings}, a16") for row in table.peers(model, stress)]
    free = table.pick(model=model, stress=stress, method=FREE)
    levels += [(row, "C0", f"{FREE}, rank {row.rank}, {row.mode}") for row in free]
    levels += [(row, "k", "16-bit rounding") for row in table.pick(model=model, stress=stress, method=EXACT)]
    for (row, colour, said), style in zip(levels, cycle(("-.", ":", "--", (0, (1, 4)))), strict=False):
        axes.axhline(100 * row.error, color=colour, lw=0.9, ls=style, label=said)


def draw_psnr(axes: Any, table: Table, model: str, stress: str) -> None:
    rows = [row for row in table.pick(model=model, stress=stress) if row.psnr != "" and row.method != SIXTEEN]
    axes.barh(range(len(rows)), [row.psnr for row in rows], color=[PICTURED.get(row.method, "C1") for row in rows])
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
    for place, row in enumerate(rows):
        axes.text(row.psnr, place, f" {100 * row.agreement:.1f} %", fontsize=7, va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    sixteen = table.looks(model=model, stress=stress, method=SIXTEEN)
    own = f"; 16 bit: {100 * sixteen.agreement:.1f} %" if sixteen else ""
    axes.set_title(f"PSNR of pictures against 16 bit, dB, and prompt agreement{own}", fontsize=9)


def label(row: Row) -> str:
    if row.settings:
        return f"{row.method}, {row.settings}"
    return f"{row.method}{f' rank {row.rank}' if row.rank else ''} {row.format} {row.mode}"
