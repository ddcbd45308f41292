"""Files of rows; and the row that benchmarks of CPUs write: one contender on one shape."""
from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.timing import Spread


@dataclass
class Origin:
    """What every row begins with: `machine.provenance()`."""

    date: str
    commit: str
    cpu: str
    torch: str
    threads: str


@dataclass
class Row(Origin):
    """Times are per call; `speedup` is over "torch bf16" of the same process, round by round. README: the columns."""

    isa: str
    op: str
    contender: str
    shape: str = ""
    m: int | str = ""
    n: int | str = ""
    k: int | str = ""
    version: str = ""
    backend: str = ""
    rounds: int | str = ""
    median_ms: float | str = ""
    low_ms: float | str = ""
    high_ms: float | str = ""
    least_ms: float | str = ""
    tops: float | str = ""
    gbps: float | str = ""
    speedup: float | str = ""
    speedup_low: float | str = ""
    speedup_high: float | str = ""
    stored_bytes: int | str = ""
    held_bytes: int | str = ""
    peak_bytes: int | str = ""
    error: float | str = ""
    rounds_ms: str = ""
    note: str = ""

    def fill_times(self, seconds: list[float], speedup: Spread | None) -> None:
        took = Spread.of([1e3 * value for value in seconds])
        self.rounds, self.rounds_ms = len(seconds), " ".join(f"{1e3 * value:.4g}" for value in seconds)
        self.median_ms, self.low_ms, self.high_ms, self.least_ms = took.median, took.low, took.high, took.least
        if speedup is not None:
            self.speedup, self.speedup_low, self.speedup_high = speedup.median, speedup.low, speedup.high


class RowFile:
    """Appends rows, of one dataclass, as they come, so that an interrupted run leaves what it has."""

    def __init__(self, path: Path, kind: type = Row) -> None:
        self.path, self.kind = path, kind

    @classmethod
    def create(cls, path: Path, kind: type = Row) -> RowFile:
        """An empty file with the header."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(names_of(kind))
        return cls(path, kind)

    def __enter__(self) -> RowFile:
        if not self.path.exists():
            self.create(self.path, self.kind)
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, names_of(self.kind), lineterminator="\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def write(self, row: Any) -> None:
        self.writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                              for name, value in asdict(row).items()})
        self.file.flush()


def names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def read(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of some files, as text."""
    found: list[dict[str, str]] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            found += csv.DictReader(file)
    return found


def line_of(row: Row) -> str:
    """A row for people."""
    if not isinstance(row.median_ms, float):
        rate = f"{row.gbps:.1f} GB/s" if isinstance(row.gbps, float) else f"{row.tops:.2f} TOP/s" if row.tops else ""
        return f"  {row.op:13} {row.contender:44} {rate or row.note}"
    rate = f"{row.tops:6.3f} TOP/s" if isinstance(row.tops, float) else ""
    rate = f"{row.gbps:6.2f} GB/s" if row.op == "weight_only" and isinstance(row.gbps, float) else rate
    speedup = f"{row.speedup:6.2f}x ({row.speedup_low:.2f}-{row.speedup_high:.2f})" if row.speedup else ""
    error = f"error {100 * row.error:.2f} %" if isinstance(row.error, float) else ""
    peak = f"peak {row.peak_bytes / 2**20:.0f} MiB" if isinstance(row.peak_bytes, int) else ""
    return f"  {row.op:13} {row.contender:44} {row.median_ms:9.2f} ms {rate:12} {speedup:19} {error} {peak} {row.note}"
