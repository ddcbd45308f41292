"""A contact sheet: prompts down, variants across, each with its name and numbers, in one PNG."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from .table import Row

SCALE = 2  # of the pictures: every pixel becomes a square of 2 × 2
GAP, MARGIN, CAPTION_WIDTH, BAR = 14, 28, 236, 4
TITLE, BODY, LINE = 17, 14, 20  # sizes of type and the distance of lines
INK, FAINT, PAPER = (28, 30, 34), (112, 117, 125), (255, 255, 255)
RIGHT, WRONG = (46, 140, 84), (206, 62, 58)
KEY = ((RIGHT, "shows what its prompt says"), (WRONG, "does not (a small trained network looks and decides)"))


@dataclass(frozen=True)
class Column:
    """A variant with the pictures shown, (B, 3, H, W) in [0, 1], and whether each shows what its prompt says."""

    row: Row
    pictures: Tensor
    right: Sequence[bool]


def pil(picture: Tensor) -> Any:
    """(3, H, W) in [0, 1] as a PIL image."""
    from PIL import Image

    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


class Sheet:
    """The page while it is drawn on."""

    def __init__(self, columns: Sequence[Column], prompts: Sequence[str], title: str, notes: Sequence[str]) -> None:
        from PIL import Image, ImageDraw

        self.columns, self.prompts, self.title, self.notes = columns, prompts, title, notes
        self.side = SCALE * columns[0].pictures.shape[-1]
        self.left = MARGIN + CAPTION_WIDTH + GAP
        self.top = MARGIN + TITLE + 2 * GAP + 4 * LINE + GAP
        self.row_height = self.side + BAR + GAP
        width = self.left + len(columns) * (self.side + GAP) - GAP + MARGIN
        height = self.top + len(prompts) * self.row_height + GAP + (1 + len(notes)) * LINE + MARGIN
        self.image = Image.new("RGB", (width, height), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def drawn(self) -> Any:
        self.write(MARGIN, MARGIN - 4, self.title, TITLE + 3)
        for i, column in enumerate(self.columns):
            self.head(self.x(i), column.row)
        for i, prompt in enumerate(self.prompts):
            y = self.top + i * self.row_height
            self.caption(prompt, y)
            for j, column in enumerate(self.columns):
                self.picture(column, i, self.x(j), y)
        self.foot(self.top + len(self.prompts) * self.row_height + GAP)
        return self.image

    def x(self, column: int) -> int:
        return self.left + column * (self.side + GAP)

    def head(self, x: int, row: Row) -> None:
        y = self.top - GAP - 4 * LINE
        dense = not row.recipe
        near = "" if dense else f"{row.psnr_db:.1f} dB, {row.ssim:.2f}"
        method, _, kind = row.weights.rpartition(" ")
        lines = ("16 bit", "") if dense else (method, f"{kind}  {row.mode}")
        self.write(x, y, lines[0], TITLE)
        self.write(x, y + LINE, lines[1], TITLE)
        self.write(x, y + 2 * LINE + 6, near, BODY, FAINT)
        self.write(x, y + 3 * LINE + 4, f"{100 * row.agreement:.0f} % as said", BODY, FAINT)

    def caption(self, prompt: str, y: int) -> None:
        lines = self.wrapped(prompt)
        start = y + (self.side - len(lines) * LINE) // 2
        for i, line in enumerate(lines):
            self.write(MARGIN, start + i * LINE, line, BODY)

    def wrapped(self, text: str) -> list[str]:
        """The fewest letters a line that keep every line within the column."""
        for width in range(60, 8, -1):
            lines = wrap(text, width)
            if max(self.font(BODY).getlength(line) for line in lines) <= CAPTION_WIDTH:
                return lines
        return [text]

    def picture(self, column: Column, i: int, x: int, y: int) -> None:
        from PIL import Image

        shown = pil(column.pictures[i]).resize((self.side, self.side), Image.Resampling.NEAREST)
        self.image.paste(shown, (x, y))
        self.bar(x, y + self.side, self.side, RIGHT if column.right[i] else WRONG)

    def bar(self, x: int, y: int, width: int, colour: tuple[int, int, int]) -> None:
        self.pen.rectangle((x, y, x + width - 1, y + BAR - 1), colour)

    def foot(self, y: int) -> None:
        x = MARGIN
        for colour, said in KEY:
            self.bar(x, y + LINE // 2 - BAR // 2, 28, colour)
            self.write(x + 36, y, said, BODY, FAINT)
            x += 36 + round(self.font(BODY).getlength(said)) + 3 * GAP
        for i, note in enumerate(self.notes):
            self.write(MARGIN, y + (i + 1) * LINE + 4, note, BODY, FAINT)

    def write(self, x: int, y: int, text: str, points: int, colour: tuple[int, int, int] = INK) -> None:
        self.pen.text((x, y), text, colour, self.font(points))

    def font(self, points: int) -> Any:
        from PIL import ImageFont

        return ImageFont.load_default(points)
