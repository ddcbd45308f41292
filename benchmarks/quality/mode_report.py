"""The summary of benchmarks.quality.modes as Markdown."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import read

Rows = Sequence[dict[str, str]]
GROUP = ("source", "data", "format", "kind")


def write_report(path: Path) -> str:
    """Beside the CSV; returns it."""
    rows = read([path])
    origin = {key: rows[0][key] for key in ("date", "commit", "cpu", "torch", "threads")}
    text = "\n".join(["# Activation modes, layer by layer", "",
                      f"Made from `{path.name}` by `benchmarks/quality/modes.py`, whose head says what is measured. "
                      f"Errors in percent, means over layers. {', '.join(f'{k} {v}' for k, v in origin.items())}.", "",
                      "## a8 beside a4", "", *ratio_lines(rows), "", verdict(rows), "",
                      "## What folding to INT8 adds", "", *fold_lines(rows), ""])
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def groups(rows: Rows, names: Sequence[str]) -> dict[tuple[str, ...], Rows]:
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(source_of(row) if name == "source" else row[name] for name in names), []).append(row)
    return found


def source_of(row: dict[str, str]) -> str:
    """Random layers are each a source."""
    return row["layer"] if row["source"] == "random" else row["source"]


def mean(rows: Rows, name: str, factor: float = 100) -> str:
    return f"{factor * statistics.mean(float(row[name]) for row in rows):.2f}"


def met(row: dict[str, str]) -> bool:
    return float(row["ratio"]) <= float(row["bar"])


def ratio_lines(rows: Rows) -> list[str]:
    lines = ["| layers of | data | format | input | layers | a4 | a8 | a16 | a8/a4 | worst | bar | met by |",
             "|---" * 12 + "|"]
    for key, found in groups(rows, GROUP).items():
        ratios = [float(row["ratio"]) for row in found]
        count = sum(map(met, found))
        cells = (*key, len(found), mean(found, "a4"), mean(found, "a8"), mean(found, "a16"),
                 f"{statistics.mean(ratios):.2f}", f"{max(ratios):.2f}", found[0]["bar"],
                 "all" if count == len(found) else f"**{count} of {len(found)}**")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def verdict(rows: Rows) -> str:
    return "; ".join(f"{data}: {sum(map(met, found))} of {len(found)} layers meet the bar"
                     for (data,), found in groups(rows, ("data",)).items()) + "."


def left(rows: Rows, name: str, over: str) -> float:
    """Σ name² / Σ over²"""
    return sum(float(row[name]) ** 2 for row in rows) / sum(float(row[over]) ** 2 for row in rows)


def fold_lines(rows: Rows) -> list[str]:
    """127: max|w|/127 for every row; left: the squared error beside that."""
    lines = ["Squared errors that are left beside those of max|w|/127 as the scale of every row, for the scales that "
             "are used and for the best of 111.", "",
             "| layers of | data | format | 4 bit | + fold, 127 | + fold | fold, 127 | fold | left | left by the best "
             "| of the output: 127 | fold | left | left by the best |", "|---" * 14 + "|"]
    for key, found in groups(rows, GROUP[:3]).items():
        cells = [*key, *(mean(found, name) for name in ("weight", "weight_127", "weight_folded", "fold_127", "fold"))]
        cells += [f"{left(found, 'fold', 'fold_127'):.2f}", f"{left(found, 'fold_best', 'fold_127'):.2f}"]
        cells += [mean(found, "output_fold_127"), mean(found, "output_fold")]
        cells += [f"{left(found, f'output_{name}', 'output_fold_127'):.2f}" for name in ("fold", "fold_best")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
