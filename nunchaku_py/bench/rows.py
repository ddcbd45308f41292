"""One row for each contender, as CSV and as what people read."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..commands.tables import table
from .spread import Spread

GB = 1e9
HEADER = ("contender", "memory", "less by", "step", "speed", "image", "load", "peak memory")


@dataclass
class Row:
    """Seconds, bytes. step: all calls of the denoiser for one denoising step; speedup: over 16 bit, round by round
    where `in_turns`; image: `measured`, or `computed` as steps × step, and what text
    encoders and decoder take where that is known; format: of weights that are random, with the
    rules given; denoiser_bytes: of all its tensors, `measured` or `computed`; peak_bytes: of the process, with what
    imports take; device_peak_bytes: of the GPU, by it."""

    date: str
    subject: str
    weights: str
    device: str
    cpu: str
    threads: int
    kernels: str
    versions: str
    width: int
    height: int
    text_tokens: int | str
    batch: int | str
    steps: int
    contender: str
    package: str
    mode: str = ""
    format: str = ""
    backends: str = ""
    denoiser_bytes: int | str = ""
    memory_is: str = ""
    times_less: float | str = ""
    rounds: int | str = ""
    step_s: float | str = ""
    step_low_s: float | str = ""
    step_high_s: float | str = ""
    speedup: float | str = ""
    speedup_low: float | str = ""
    speedup_high: float | str = ""
    in_turns: str = ""
    text_s: float | str = ""
    decoder_s: float | str = ""
    image_s: float | str = ""
    image_is: str = ""
    load_s: float | str = ""
    imports_bytes: int | str = ""
    peak_bytes: int | str = ""
    device_peak_bytes: int | str = ""
    rounds_s: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.contender} {self.mode}" if self.mode else self.contender

    def fill_times(self, steps: Sequence[float], images: Sequence[float]) -> None:
        took = Spread.of(steps)
        self.rounds, self.rounds_s = len(steps), " ".join(f"{value:.4g}" for value in steps)
        self.step_s, self.step_low_s, self.step_high_s = took.median, took.low, took.high
        self.image_is = "measured" if images else "computed"
        self.image_s = Spread.of(images).median if images else (
            self.steps * took.median + (self.text_s or 0) + (self.decoder_s or 0))

    def fill_speedup(self, ratios: Sequence[float], in_turns: bool) -> None:
        ratio = Spread.of(ratios)
        self.speedup, self.speedup_low, self.speedup_high = ratio.median, ratio.low, ratio.high
        self.in_turns = "yes" if in_turns else "no"

    def cells(self) -> list[str]:
        """In the order of HEADER. ~ marks what was computed or not compared in turns."""
        memory = f"{'~' if self.memory_is == 'computed' else ''}{gigabytes(self.denoiser_bytes)}"
        times = f"{self.times_less:.2f}x" if isinstance(self.times_less, float) else ""
        image = f"{'~' if self.image_is == 'computed' else ''}{seconds(self.image_s)}" if self.image_s != "" else ""
        return [self.label, memory if self.denoiser_bytes != "" else "", times, self.step, self.speed, image,
                seconds(self.load_s), gigabytes(self.device_peak_bytes or self.peak_bytes)]

    @property
    def step(self) -> str:
        if self.step_s == "":
            return ""
        spread = f" ({seconds(self.step_low_s)}-{seconds(self.step_high_s)})" if self.rounds != 1 else ""
        return f"{seconds(self.step_s)}{spread}"

    @property
    def speed(self) -> str:
        if self.speedup == "":
            return ""
        spread = f" ({self.speedup_low:.2f}-{self.speedup_high:.2f})" if self.rounds != 1 else ""
        return f"{'' if self.in_turns == 'yes' else '~'}{self.speedup:.2f}x{spread}"


def seconds(value: float | str) -> str:
    if value == "":
        return ""
    if value >= 600:
        return f"{value / 60:.1f} min"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def gigabytes(count: int | str) -> str:
    """Decimal, as the sizes of files and of graphics cards are usually said."""
    if count == "":
        return ""
    return f"{count / GB:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def text(rows: Sequence[Row]) -> str:
    """The rows with figures as a table; below it, who has none and why, and what else is to be said."""
    measured = [row.cells() for row in rows if row.step_s != ""]
    return "\n".join([table(HEADER, measured), *notes(rows)] if measured else notes(rows))


def notes(rows: Sequence[Row]) -> list[str]:
    """What is to be said of rows, alike ones together."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.note, []).append(row.label)
    return [f"{', '.join(labels)}: {note}" for note, labels in found.items() if note]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value
                             for name, value in asdict(row).items()})
