"""A CSV of benchmarks.ops or benchmarks.blocks as a picture: how many times as fast as torch bf16, shape by shape.

    python -m benchmarks.plot benchmarks/results/ops_cpu.csv --op linear --out benchmarks/results/ops_cpu_linear.png

Bars are medians of the ratios of single rounds, whiskers their quartiles; beside each: rate, error, bytes stored.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.rows import read

OURS = "nunchaku-py"
COLOURS = {OURS: "C0", "oneDNN": "C1", "torchao": "C2", "torch": "0.55", "sdnq": "C3", "bitsandbytes": "C4"}
PARTIAL = "input given"  # without quantizing the input: drawn paler
COLUMNS = 2
Row = dict[str, str]


def panels(rows: Sequence[Row], op: str, contenders: Sequence[str]) -> dict[str, list[Row]]:
    """Title → the rows of one shape and number of threads, those of other processes of the same machine included."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        chosen = any(fnmatchcase(row["contender"], glob) for glob in contenders)
        if row["op"] == op and row["speedup"] and chosen:
            size = f", {row['m']}×{row['k']} → {row['n']}" if row["k"] else f", {row['m']} tokens"
            found.setdefault(f"{row['shape']}{size}, {row['threads']} threads", []).append(row)
    return {title: bars(members) for title, members in found.items()}


def bars(rows: Sequence[Row]) -> list[Row]:
    """One row for each contender; ours once more for every further instruction set, which the label then names."""
    kept: dict[tuple[str, str], Row] = {}
    names: set[str] = set()
    for row in rows:
        key = (row["contender"], row["isa"] if row["contender"].startswith(OURS) else "")
        if key not in kept:
            label = f"{row['contender']} [{row['isa']}]" if row["contender"] in names else row["contender"]
            kept[key] = {**row, "label": label}
            names.add(row["contender"])
    return sorted(kept.values(), key=lambda row: float(row["speedup"]))


def colour(label: str) -> str:
    return next((value for name, value in COLOURS.items() if label.startswith(name)), "C5")


def remark(row: Row) -> str:
    """Rate, error and size, as far as a row has them."""
    rate = f"{float(row['tops']):.2f} TOP/s" if row["tops"] and row["op"] != "weight_only" else ""
    rate = f"{float(row['gbps']):.1f} GB/s" if row["op"] == "weight_only" and row["gbps"] else rate
    error = f"{100 * float(row['error']):.2g} %" if row["error"] else ""
    size = f"{float(row['stored_bytes']) / 1e6:.3g} MB" if row["stored_bytes"] else ""
    return "  ".join(part for part in (f"{float(row['speedup']):.2f}×", rate, error, size) if part)


def draw(found: dict[str, list[Row]], caption: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    tallest = max(map(len, found.values()))
    figure, axes = pyplot.subplots(lines, columns, figsize=(8.2 * columns, lines * (0.9 + 0.24 * tallest) + 0.5),
                                   squeeze=False, dpi=95)
    for place, (title, rows) in zip(axes.flat, found.items(), strict=False):
        draw_panel(place, title, rows)
    for place in axes.flat[len(found):]:
        place.axis("off")
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def draw_panel(axes: Any, title: str, rows: Sequence[Row]) -> None:
    value, low, high = ([float(row[name]) for row in rows] for name in ("speedup", "speedup_low", "speedup_high"))
    spread = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
    labels, places = [row["label"] for row in rows], range(len(rows))
    drawn = axes.barh(places, value, xerr=spread, color=[colour(label) for label in labels], error_kw={"lw": 0.8},
                      height=0.7)
    for bar, label in zip(drawn, labels, strict=True):
        bar.set_alpha(0.45 if PARTIAL in label else 1)
    axes.set_yticks(places, labels, fontsize=7)
    axes.axvline(1, color="k", lw=0.7, zorder=0)
    axes.set_xlim(0, 1.6 * max(high))
    for place, row, end in zip(places, rows, high, strict=True):
        axes.text(end + 0.015 * axes.get_xlim()[1], place, remark(row), fontsize=6.5, va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("times as fast as torch bf16", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)


def caption_of(rows: Sequence[Row], op: str) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows))
    isa = next((row["isa"] for row in rows if row["contender"].startswith(OURS)), "")
    return (f"{op}: {all_of('cpu')}, torch {all_of('torch')}, commit {all_of('commit')}, {rows[0]['date']} UTC"
            + (f"; {OURS} on {isa} where nothing else is said" if isa else ""))


def main(argv: Sequence[str] | None = None) -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--op", default="linear", help="of the column op: linear, mlp, weight_only, block, …")
    parser.add_argument("--contenders", nargs="+", default=["*"], help="globs of their names")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = read(args.csv)
    found = panels(rows, args.op, args.contenders)
    if not found:
        return f"no rows with a speedup and op {args.op!r}; there are {', '.join(sorted({row['op'] for row in rows}))}"
    try:
        draw(found, caption_of([row for row in rows if row["op"] == args.op], args.op), args.out)
    except ModuleNotFoundError as missing:
        return f"{missing.name} is not installed, and draws the picture: pip install matplotlib"
    return None


if __name__ == "__main__":
    sys.exit(main())
