"""From the CSV of peers.py: the table of ratios at equal or fewer bytes, and the plot of error against bits."""
from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = ("svdquant-int4", "svdquant-nvfp4", "w4a16-int4")
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, kind in (("rank", int), ("seed", int), ("bytes", int), ("bits_per_weight", float),
                           ("output_error", float), ("seconds", float)):
            row[name] = kind(row[name]) if row[name] else None
    return rows


def write_report(path: Path) -> None:
    rows = read(path)
    path.with_suffix(".md").write_text(page(rows, path.name), encoding="utf-8")
    plot(rows, path.with_suffix(".png"))


# ---------------------------------------------------------------------------------------------------- the table
def page(rows: list[Row], source: str) -> str:
    parts = ["# Output error at equal or fewer bytes", "",
             f"Made from `{source}`; how it was measured stands in `benchmarks/quality/README.md`. A ratio below 1 "
             "means that ours is lower. Spread: least – most over the seeds.", ""]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        here = [row for row in rows if row["layer"] == layer]
        parts += [f"## {layer}", "", *against_peers(here), "", "Ours in all three activation modes, and seconds:", "",
                  *in_modes(here), ""]
    return "\n".join(parts)


def against_peers(rows: list[Row]) -> list[str]:
    lines = ["| peer (data-free) | bits | error | s | ours, data-free, bits | error | ratio "
             "| ours, calibrated, bits | error | ratio |", "|---|---|---|---|---|---|---|---|---|---|"]
    for (method, settings), found in grouped(rows, ours=False).items():
        head = f"| {method}, {settings} "
        if found[0]["output_error"] is None:
            lines.append(f"{head}| – | `{found[0]['note']}` | – | – | – | – | – | – | – |")
            continue
        bits = found[0]["bits_per_weight"]
        cells = "".join(comparison(found, best_fit(rows, found, data_free)) for data_free in (True, False))
        lines.append(f"{head}| {bits:.3f} | {errors(found)} | {seconds(found)} {cells}|")
    return lines


def grouped(rows: Iterable[Row], ours: bool) -> dict[tuple[str, str], list[Row]]:
    out: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row["method"] in OURS) == ours:
            out.setdefault((row["method"], row["settings"]), []).append(row)
    return out


def best_fit(rows: list[Row], peer: list[Row], data_free: bool) -> list[Row]:
    """Of our recipes, each at its largest rank within the peer's bytes, the one with the least mean error.

    Settings that no recipe ships stand in only where nothing else fits."""
    fits: dict[str, list[Row]] = {}
    others: list[list[Row]] = []
    for (method, settings), found in grouped(rows, ours=True).items():
        kept = [row for row in found if row["mode"] == "a16" and (row["data"] == "data-free") == data_free
                and row["bytes"] <= peer[0]["bytes"]]
        if not {row["seed"] for row in kept} >= {row["seed"] for row in peer}:
            continue
        if not shipped(settings):
            others.append(kept)
        elif kept[0]["rank"] >= fits.get(method, kept)[0]["rank"]:
            fits[method] = kept
    return min(fits.values() or others, key=lambda found: statistics.mean(row["output_error"] for row in found),
               default=[])


def shipped(settings: str) -> bool:
    return "no recipe" not in settings


def comparison(peer: list[Row], ours: list[Row]) -> str:
    if not ours:
        return "| nothing fits | – | – "
    theirs = {row["seed"]: row["output_error"] for row in peer}
    ratios = [row["output_error"] / theirs[row["seed"]] for row in ours]
    said = f"{ours[0]['method']} {ours[0]['settings']}, {ours[0]['bits_per_weight']:.3f}"
    lost = " **lost**" if max(ratios) >= 1 else ""
    return f"| {said} | {errors(ours)} | {statistics.mean(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f}){lost} "


def errors(rows: list[Row]) -> str:
    found = [100 * row["output_error"] for row in rows]
    return f"{statistics.mean(found):.2f} %" + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def seconds(rows: list[Row]) -> str:
    return f"{statistics.median(row['seconds'] for row in rows):.1f}"


def in_modes(rows: list[Row]) -> list[str]:
    lines = ["| ours | data | bits | a16 | a8 | a4 | s | seeds |", "|---|---|---|---|---|---|---|---|"]
    for (method, settings), found in grouped(rows, ours=True).items():
        for data in dict.fromkeys(row["data"] for row in found):
            alike = [row for row in found if row["data"] == data]
            by_mode = {mode: [row for row in alike if row["mode"] == mode] for mode in ("a16", "a8", "a4")}
            cells = " | ".join(errors(part) if part else "" for part in by_mode.values())
            first = by_mode["a16"]
            lines.append(f"| {method}, {settings} | {data} | {first[0]['bits_per_weight']:.3f} | {cells} | "
                         f"{seconds(first)} | {len(first)} |")
    return lines


# ----------------------------------------------------------------------------------------------------- the plot
LINES = {("svdquant-int4", True): ("C0", "--"), ("svdquant-int4", False): ("C0", "-"),
         ("svdquant-nvfp4", True): ("C2", "--"), ("svdquant-nvfp4", False): ("C2", "-")}
ALONE = {"w4a16-int4": ("k", "*"), "svdquant-int4": ("C0", "X")}  # settings that are no point of a curve
MARKS = {"sdnq uint4": ("C3", "s"), "bitsandbytes NF4": ("C1", "^"), "torchao NF4": ("C4", "v"),
         "torchao int4": ("C5", "D")}


def plot(rows: list[Row], path: Path) -> None:
    """The first layer: our curves over all ranks (first seed), every peer as a point, the other seeds paler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = rows[0]["layer"]
    shown = [row for row in rows if row["layer"] == first and row["mode"] == "a16" and row["output_error"] is not None]
    figure, axes = pyplot.subplots(figsize=(10.5, 6.5), dpi=95)
    draw_ours(axes, shown)
    draw_peers(axes, shown)
    axes.set_yscale("log")
    ticks = (2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20)
    axes.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("bits per weight, everything stored counted, bias excluded")
    axes.set_ylabel("relative output error on held-out tokens, 16-bit activations")
    axes.set_title(f"{first}, heavy-tailed weights, 1 % of channels 30× larger")
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False,
                title="* no recipe ships it", title_fontsize=7.5)
    figure.tight_layout()
    figure.savefig(path, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def draw_ours(axes: Any, rows: list[Row]) -> None:
    for (method, data_free), (colour, style) in LINES.items():
        found = [row for row in rows if row["method"] == method and shipped(row["settings"])
                 and (row["data"] == "data-free") == data_free]
        curve = sorted((row for row in found if row["seed"] == 0), key=lambda row: row["rank"])
        axes.plot(*points(curve), color=colour, linestyle=style, marker="o", markersize=5,
                  label=f"{method}, {curve[0]['data']}; numbers are ranks")
        axes.plot(*points(row for row in found if row["seed"]), "o", color=colour, markersize=3, alpha=0.3)
        for row in curve:
            axes.annotate(row["rank"], (row["bits_per_weight"], 100 * row["output_error"]), fontsize=7, color=colour,
                          xytext=(0, 5), textcoords="offset points", ha="center")
    for (method, settings), found in grouped(rows, ours=True).items():
        if method == "w4a16-int4" or not shipped(settings):
            draw_alone(axes, method, settings.replace(" (no recipe ships it)", " *"), found)


def draw_alone(axes: Any, method: str, settings: str, rows: list[Row]) -> None:
    colour, shape = ALONE[method]
    for data in dict.fromkeys(row["data"] for row in rows):
        face = "none" if data == "data-free" else colour
        axes.plot(*points(row for row in rows if row["data"] == data and row["seed"] == 0), shape, color=colour,
                  markerfacecolor=face, markersize=9, label=f"{method} {settings}, {data}")


def draw_peers(axes: Any, rows: list[Row]) -> None:
    peers = grouped(rows, ours=False)
    firsts = [next(row for row in found if row["seed"] == 0) for found in peers.values()]
    for place, ((method, settings), found) in enumerate(peers.items()):
        (colour, shape), letter, first = MARKS[method], chr(ord("a") + place), firsts[place]
        axes.plot(*points([first]), shape, color=colour, markersize=6, alpha=0.8, linestyle="none",
                  label=f"{letter}: {method}, {settings}")
        axes.plot(*points(row for row in found if row["seed"]), shape, color=colour, markersize=3, alpha=0.3)
        axes.annotate(letter, (first["bits_per_weight"], 100 * first["output_error"]), fontsize=8, color=colour,
                      xytext=letter_place(first, firsts), textcoords="offset points")


def letter_place(row: Row, rows: list[Row]) -> tuple[float, float]:
    """Left and right in turn, fanned out, among the points that have about as many bits."""
    near = sorted((other for other in rows if abs(other["bits_per_weight"] - row["bits_per_weight"]) < 0.02),
                  key=lambda other: other["output_error"])
    i = near.index(row)
    return (7 if i % 2 else -13), 6 * (i - (len(near) - 1) / 2) - 3


def points(rows: Iterable[Row]) -> tuple[list[float], list[float]]:
    found = list(rows)
    return [row["bits_per_weight"] for row in found], [100 * row["output_error"] for row in found]
