"""The rows of slow_recipe.py as a page."""
from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.rows import read

ERROR_BAR, TIME_BAR = 1.01, 15.0


def write_report(table: Path) -> str:
    """Writes FILE.md beside FILE.csv; returns it."""
    rows = read([table])
    keys = list(dict.fromkeys((row["source"], row["format"], row["preset"]) for row in rows))
    lines = ["# Ours beside the exact slow recipe", "",
             f"Error on held-out tokens over the slow recipe's (bar: at most {ERROR_BAR:g}), and how many times faster",
             f"(bar: at least {TIME_BAR:g}), in CPU seconds. In brackets the least and the most of the layers.", "",
             "| layers | format | preset | number | error ratio | over | faster, all | each | under |",
             "|---|---|---|---|---|---|---|---|---|"]
    lines += [_line(key, [r for r in rows if (r["source"], r["format"], r["preset"]) == key]) for key in keys]
    page = "\n".join([*lines, "", *_details(rows)]) + "\n"
    table.with_suffix(".md").write_text(page, encoding="utf-8")
    return page


def _line(key: tuple[str, str, str], rows: list[dict[str, str]]) -> str:
    errors, times = ([float(row[name]) for row in rows] for name in ("error_ratio", "time_ratio"))
    whole = sum(float(row["slow_cpu_seconds"]) for row in rows) / sum(float(row["cpu_seconds"]) for row in rows)
    cells = (*key[:2], key[2] or "none", str(len(rows)), _spread(errors, 3), str(sum(e > ERROR_BAR for e in errors)),
             f"{whole:.0f}", _spread(times, 0), str(sum(t < TIME_BAR for t in times)))
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} [{min(values):.{digits}f} – {max(values):.{digits}f}]"


def _details(rows: list[dict[str, str]]) -> list[str]:
    wide = [row for row in rows if row["extrapolated"] == "yes"]
    if not wide:
        return []
    head = ["Of the slow recipe's CPU seconds here those of its SVDs are their number times the time of one.", "",
            "| layer | format | preset | slow error % | error % | slow CPU s | CPU s | SVDs | slow TFLOP |",
            "|---|---|---|---|---|---|---|---|---|"]
    return head + [f"| {r['layer']} | {r['format']} | {r['preset'] or 'none'} | {100 * float(r['slow_error']):.2f} | "
                   f"{100 * float(r['error']):.2f} | {float(r['slow_cpu_seconds']):.0f} | "
                   f"{float(r['cpu_seconds']):.1f} | {r['svds']} | {float(r['slow_tflop']):.0f} |" for r in wide]
