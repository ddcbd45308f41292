"""What quantization did, site by site: as text, JSON and CSV."""
from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch


@dataclass
class SiteRow:
    """One quantized linear, or one K-part of it. Errors are relative output errors after each step of the recipe."""

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

    def summary(self) -> dict[str, Any]:
        """The part that is written into checkpoints: nothing that differs from run to run."""
        return {"sites": len({row.name for row in self.rows}), "kept": len(self.kept),
                "bytes_before": self.model_bytes_before, "bytes_after": self.model_bytes_after}

    def text(self, limit: int | None = None) -> str:
        steps = self._steps()
        header = ["site", "kind", "format", "rank", "N", "K", "data", *steps, "bytes"]
        rows = [[_label(row), row.kind, row.format, *map(str, (row.rank, row.out_features, row.in_features)), row.data,
                 *(_percent(row.errors.get(step)) for step in steps), _ratio(row.bytes_before, row.bytes_after)]
                for row in self.rows]
        more = [] if limit is None or len(rows) <= limit else [f"… and {len(rows) - limit} more sites"]
        lines = [*_table(header, rows[:limit]), *more, "", *self._kept_lines(), *self._total_lines()]
        return "\n".join(lines)

    def _steps(self) -> list[str]:
        return list(dict.fromkeys(step for row in self.rows for step in row.errors))

    def _kept_lines(self) -> list[str]:
        reasons = Counter(self.kept.values())
        return [f"kept in 16 bit: {count} ({reason})" for reason, count in reasons.most_common()]

    def _total_lines(self) -> list[str]:
        before, after = self.model_bytes_before, self.model_bytes_after
        ratio = f" ({before / after:.2f}x smaller)" if after else ""
        sites = len({row.name for row in self.rows})
        return [f"{sites} linears quantized by {self.recipe} in {self.seconds:.1f} s: "
                f"{_mib(before)} -> {_mib(after)}{ratio}", *self.notes]

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
        out.model_bytes_before += report.model_bytes_before
        out.model_bytes_after += report.model_bytes_after
        out.seconds += report.seconds
    return out


def _label(row: SiteRow) -> str:
    return row.name if row.k_range is None else f"{row.name}[{row.k_range[0]}:{row.k_range[1]}]"


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
