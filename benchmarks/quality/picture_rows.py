"""The rows that benchmarks.quality.pictures writes, and which of them are there already."""
from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.rows import Origin

Number = float | str  # "": not measured


@dataclass
class Row(Origin):
    """One model, quantized in one way, in one activation mode."""

    model: str
    weights: str  # fingerprint of the denoiser
    stress: str  # "plain" | "stressed"
    method: str
    settings: str = ""  # of another package
    format: str = ""
    rank: int | str = ""
    mode: str = "a16"
    seed: int | str = 0
    states: int | str = 0  # forwards that `error` is measured on
    prompts: int | str = 0  # pictures that the others are measured on; 0: none were made
    bytes: int | str = ""  # of the quantized layers, biases left out
    error: Number = ""
    psnr: Number = ""
    ssim: Number = ""
    feature: Number = ""
    frechet: Number = ""
    agreement: Number = ""
    seconds: Number = ""  # of quantizing
    note: str = ""


NAMES = tuple(field.name for field in fields(Row))
# What tells a row from others: with all of these alike, nothing needs to be measured again.
KEY = ("model", "weights", "stress", "method", "settings", "format", "rank", "mode", "seed", "states", "prompts")
NUMBERS = ("error", "psnr", "ssim", "feature", "frechet", "agreement", "seconds")
WHOLE = ("rank", "seed", "states", "prompts", "bytes")
Key = tuple[str, ...]


def key_of(row: Row) -> Key:
    return tuple(str(getattr(row, name)) for name in KEY)


def read(path: Path) -> list[Row]:
    """The rows of a file, numbers as numbers; none where there is no file. A line that was cut off is left out, and a
    second header, where two processes began the file at once. Each line stands for itself, so that a quote which a cut
    left open takes no other row with it."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [cells for line in lines for cells in csv.reader([line]) if len(cells) == len(NAMES) and cells[0] != "date"]
    return [Row(**{name: _value(name, text) for name, text in zip(NAMES, cells, strict=True)}) for cells in found]


def _value(name: str, text: str) -> float | int | str:
    if not text or name not in NUMBERS + WHOLE:
        return text
    return float(text) if name in NUMBERS else int(text)


def append(path: Path, row: Row) -> None:
    """Written at once, so that an interrupted run leaves what it has."""
    new = not path.exists() or not path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_line(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _text(value) for name, value in asdict(row).items()})


def _text(value: float | int | str) -> str:
    """Of one line, which what other packages say often is not."""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _end_line(path: Path) -> None:
    """A line that was cut off gets its end, so that the next one does not continue it. Only ever appended: another
    process may be writing too."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each model only the rows of the weights that were measured last, and of each key the last row."""
    rows = list(rows)
    weights = {(row.model, row.stress): row.weights for row in rows}
    kept = {key_of(row): row for row in rows if row.weights == weights[row.model, row.stress]}
    return list(kept.values())
