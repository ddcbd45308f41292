"""Bars: how much memory the denoiser takes, how long a step takes. Drawn with Pillow, which is no requirement."""
from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .job import DENSE, OURS
from .rows import Row, gigabytes, seconds

SCALE = 2  # pixels of the picture for one of the sizes below, for screens that have them
MARGIN, GAP, LINE, BAR = 28, 36, 34, 18
PLOT, VALUE = 300, 150  # widths of the longest bar, and of what stands behind it
TITLE, BODY, SMALL = 17, 13, 11
INK, FAINT, PAPER, GRID = (28, 30, 34), (112, 117, 125), (255, 255, 255), (227, 229, 232)
COLOURS = {DENSE: (150, 156, 165), OURS: (52, 105, 196)}
PEER = (221, 160, 84)


@dataclass(frozen=True)
class Value:
    """One bar: its length, what is written behind it, quartiles, and whether it was measured."""

    value: float
    said: str
    low: float
    high: float
    measured: bool


def png(rows: Sequence[Row]) -> bytes:
    """The picture of all rows that have figures."""
    shown = [row for row in rows if row.step_s != ""]
    held = io.BytesIO()
    Chart(shown or list(rows[:1])).drawn().save(held, "PNG", optimize=True)
    return held.getvalue()


def memory_of(row: Row) -> Value | None:
    if row.denoiser_bytes == "":
        return None
    count, times = float(row.denoiser_bytes), row.times_less
    said = gigabytes(row.denoiser_bytes) + (f", {times:.2f}x less" if isinstance(times, float) else "")
    return Value(count, said, count, count, row.memory_is == "measured")


def step_of(row: Row) -> Value | None:
    if row.step_s == "":
        return None
    said = seconds(row.step_s) + (f", {row.speedup:.2f}x as fast" if isinstance(row.speedup, float) else "")
    return Value(row.step_s, said, row.step_low_s, row.step_high_s, True)


PANELS = (("Memory of the denoiser", memory_of), ("Time of a step", step_of))


class Chart:
    """The picture while it is drawn on; lengths are in units of SCALE pixels."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.first = rows, rows[0]
        self.names = max(self.width(row.label, BODY) for row in rows)
        self.top = MARGIN + 84
        width = MARGIN + self.names + len(PANELS) * (GAP + PLOT + VALUE) + MARGIN
        height = self.top + len(rows) * LINE + 44 + MARGIN
        self.image = Image.new("RGB", (SCALE * round(width), SCALE * height), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def drawn(self) -> Any:
        row = self.first
        self.write(MARGIN, MARGIN - 6, f"{row.subject}, {row.width}x{row.height}", TITLE + 3)
        about = f"{row.device}, {row.threads} CPU threads, {row.kernels}; {row.versions}"
        self.write(MARGIN, MARGIN + 24, about, SMALL, FAINT)
        for i, one in enumerate(self.rows):
            self.write(MARGIN, self.top + i * LINE + 1, one.label, BODY)
        for i, (title, value_of) in enumerate(PANELS):
            x = MARGIN + self.names + GAP + i * (PLOT + VALUE + GAP)
            self.panel(x, title, [value_of(one) for one in self.rows])
        self.write(MARGIN, self.top + len(self.rows) * LINE + 18, self.foot(), SMALL, FAINT)
        return self.image

    def foot(self) -> str:
        random = "Random weights: speed and memory only. " if "random" in self.first.weights else ""
        outlined = any(row.memory_is == "computed" for row in self.rows)
        return (f"{random}Medians; the thin lines reach from the first to the third quartile."
                + (" Outlined: computed, it does not fit here." if outlined else ""))

    def panel(self, x: float, title: str, values: Sequence[Value | None]) -> None:
        self.write(x, self.top - 36, title, BODY + 1)
        self.write(x + self.width(title, BODY + 1) + 8, self.top - 34, "less is better", SMALL, FAINT)
        longest = max((value.high for value in values if value), default=1.0)
        self.box(x - 1, self.top - 8, x, self.top + len(values) * LINE - 8, GRID)
        for i, value in enumerate(values):
            if value:
                self.bar(x, self.top + i * LINE, value, PLOT / longest, self.rows[i].contender)

    def bar(self, x: float, y: float, value: Value, unit: float, contender: str) -> None:
        colour, end = COLOURS.get(contender, PEER), x + value.value * unit
        if value.measured:
            self.box(x, y, end, y + BAR, colour)
        else:
            self.box(x, y, end, y + BAR, PAPER, colour)
        if value.high > value.low:
            self.box(x + value.low * unit, y + BAR / 2 - 0.5, x + value.high * unit, y + BAR / 2 + 0.5, INK)
        self.write(x + max(value.value, value.high) * unit + 8, y + 1, value.said, BODY)

    def box(self, left: float, top: float, right: float, bottom: float, fill: tuple, outline: tuple | None = None
            ) -> None:
        corners = [round(SCALE * edge) for edge in (left, top, max(right, left + 0.5), bottom)]
        self.pen.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill, outline, SCALE)

    def write(self, x: float, y: float, text: str, points: int, colour: tuple[int, int, int] = INK) -> None:
        self.pen.text((round(SCALE * x), round(SCALE * y)), text, colour, font(points))

    def width(self, text: str, points: int) -> float:
        return font(points).getlength(text) / SCALE


def font(points: int) -> Any:
    return ImageFont.load_default(SCALE * points)
