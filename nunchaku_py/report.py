"""What quantization did, site by site: as text, JSON and CSV."""
from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch


@dataclass
class SiteRow:
    """One quantized linear, or one K-part of it. Errors are relative output errors after each step of the recipe, in
    mode a4; a8 is the last of them in mode a8. fold: what folding the weight to INT8 for a8 changes, relative to it."""

    name: str
    kind: str
    format: str
    rank: int
    out_features: int
    in_features: int
    k_range: tuple[int, int] | None
    bytes_before: int
    bytes_after: int
    data: str  # "calibrated" | "data-free"
    errors: dict[str, float] = field(default_factory=dict)
    a8: float | None = None
    fold: float | None = None


@dataclass
class Report:
    """Rows of quantized sites, and what was left in 16 bit and why."""

    recipe: str
    rows: list[SiteRow] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    model_dtype: torch.dtype | None = None
    modes: list[str] = field(default_factory=list)  # how many sites run in which, where the model was quantized

    def summary(self) -> dict[str, Any]:
        """The part that is written into checkpoints: nothing that differs from run to run."""
        return {"sites": len({row.name for row in self.rows}), "kept": len(self.kept),
                "bytes_before": self.model_bytes_before, "bytes_after": self.model_bytes_after}

    def text(self, limit: int | None = None) -> str:
        steps, beside = self._steps(), self._beside()
        header = ["site", "kind", "format", "rank", "N", "K", "data", *steps, *beside, "bytes"]
        rows = [[_label(row), row.kind, row.format, *map(str, (row.rank, row.out_features, row.in_features)), row.data,
                 *(_percent(row.errors.get(step)) for step in steps),
                 *(_percent(getattr(row, name)) for name in beside), _ratio(row.bytes_before, row.bytes_after)]
                for row in self.rows]
        more = [] if limit is None or len(rows) <= limit else [f"… and {len(rows) - limit} more sites"]
        lines = [*_table(header, rows[:limit]), *more, "", *self._kept_lines(), *self._total_lines()]
        return "\n".join(lines)

    def _steps(self) -> list[str]:
        return list(dict.fromkeys(step for row in self.rows for step in row.errors))

    def _beside(self) -> list[str]:
        """What of a8 is known of any site."""
        return [name for name in ("a8", "fold") if any(getattr(row, name) is not None for row in self.rows)]

    def _kept_lines(self) -> list[str]:
        reasons = Counter(self.kept.values())
        return [f"kept in 16 bit: {count} ({reason})" for reason, count in reasons.most_common()]

    def _total_lines(self) -> list[str]:
        before, after = self.model_bytes_before, self.model_bytes_after
        ratio = f" ({before / after:.2f}x smaller)" if after else ""
        sites = len({row.name for row in self.rows})
        return [*self._fold_lines(), *(f"modes on {mode}" for mode in self.modes),
                f"{sites} linears quantized by {self.recipe} in {self.seconds:.1f} s: "
                f"{_mib(before)} -> {_mib(after)}{ratio}", *self.notes]

    def _fold_lines(self) -> Iterator[str]:
        """How a8 compares over all sites that have it."""
        folds = [row.fold for row in self.rows if row.fold is not None]
        both = [(row.a8, list(row.errors.values())[-1]) for row in self.rows if row.a8 is not None and row.errors]
        if both:
            a8, a4 = (sum(part) / len(both) for part in zip(*both, strict=True))
            yield f"mean error of their outputs: {_percent(a4)} in mode a4, {_percent(a8)} in a8"
        yield from fold_lines(folds)

    def to_json(self) -> str:
        data = {**asdict(replace(self, model_dtype=None)), "model_dtype": str(self.model_dtype).removeprefix("torch.")}
        return json.dumps(data, indent=1)

    def to_csv(self) -> str:
        steps = self._steps()
        plain = [name for name in SiteRow.__dataclass_fields__ if name != "errors"]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*plain, *(f"error_{step}" for step in steps)])
        for row in self.rows:
            writer.writerow([*(getattr(row, name) for name in plain), *(row.errors.get(step, "") for step in steps)])
        return out.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write report.txt, report.json and report.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("txt", self.text()), ("json", self.to_json()), ("csv", self.to_csv())):
            (folder / f"report.{suffix}").write_text(content + ("" if content.endswith("\n") else "\n"))

    def __str__(self) -> str:
        return self.text(limit=40)


def merged(reports: dict[str, Report]) -> Report:
    """One report of several components; names get the component's name in front."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    first = next(iter(reports.values()))
    out = Report(" + ".join(dict.fromkeys(report.recipe for report in reports.values())), model_dtype=first.model_dtype)
    for component, report in reports.items():
        out.rows += [replace(row, name=f"{component}.{row.name}") for row in report.rows]
        out.kept |= {f"{component}.{name}": reason for name, reason in report.kept.items()}
        out.groups += [[f"{component}.{name}" for name in group] for group in report.groups]
        out.notes += [f"{component}: {note}" for note in report.notes]
        out.modes += [f"{mode} ({component})" for mode in report.modes]
        out.model_bytes_before += report.model_bytes_before
        out.model_bytes_after += report.model_bytes_after
        out.seconds += report.seconds
    return out


def _label(row: SiteRow) -> str:
    return row.name if row.k_range is None else f"{row.name}[{row.k_range[0]}:{row.k_range[1]}]"


def fold_lines(folds: list[float]) -> list[str]:
    """The mean, the least and the most of what a8's fold changes; no line where there is nothing to fold."""
    if not folds:
        return []
    mean, least, most = (_percent(value) for value in (sum(folds) / len(folds), min(folds), max(folds)))
    return [f"fold: a8 changes 4-bit weights, which it folds to INT8, by {mean} ({least} to {most})"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _ratio(before: int, after: int) -> str:
    return f"{before / max(after, 1):.2f}x"


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]]
