"""The contact sheet, the page and the table: every picture and number stands where it should."""

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nunchaku_py.demo import sheet, table
from nunchaku_py.demo.page import page
from nunchaku_py.demo.sheet import RIGHT, WRONG, Column, Sheet
from nunchaku_py.demo.table import Row

DENSE = Row("", "", math.inf, 1.0, 0.75, 0.0, 8.0, 4 * 2**20, 4 * 2**20)
QUANTIZED = Row("svdquant-int4", "a8", 31.25, 0.9876, 0.5, 0.0123, 4.0, 2**20, 2**21, 3.0)
PROMPTS = ["a red circle", "a large striped purple ring at the bottom right and a small <b>yellow</b> star on a black "
                           "background"]


def columns() -> list[Column]:
    """Each picture of one colour of its own."""
    flat = torch.tensor([[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]])[:, :, None, None].expand(2, 3, 8, 8)
    return [Column(DENSE, flat, [True, False]), Column(QUANTIZED, 1 - flat, [False, True])]


def test_pictures_stand_in_their_place_with_their_verdict():
    drawing = Sheet(columns(), PROMPTS, "title", ["a note"])
    image = drawing.drawn()
    for j, column in enumerate(columns()):
        for i in range(2):
            x, y = drawing.x(j), drawing.top + i * drawing.row_height
            colour = tuple(round(255 * value) for value in column.pictures[i, :, 0, 0].tolist())
            assert {image.getpixel((x + dx, y + dy)) for dx in (0, 15) for dy in (0, 15)} == {colour}
            assert image.getpixel((x, y + 16)) == (RIGHT if column.right[i] else WRONG)
            assert image.getpixel((x + 16, y)) == image.getpixel((x - 1, y)) == sheet.PAPER


def test_captions_are_wrapped_into_their_column():
    drawing = Sheet(columns(), PROMPTS, "title", [])
    lines = drawing.wrapped(PROMPTS[1])
    assert " ".join(lines) == PROMPTS[1] and len(lines) > 2
    assert all(drawing.font(sheet.BODY).getlength(line) <= sheet.CAPTION_WIDTH for line in lines)
    assert drawing.wrapped(PROMPTS[0]) == [PROMPTS[0]]


def test_page_says_every_number_and_escapes_prompts():
    said = page("tiny & small", "about", columns(), PROMPTS, ["a note"])
    for cell in QUANTIZED.cells(DENSE):
        assert cell in said
    assert "tiny &amp; small" in said and "&lt;b&gt;yellow" in said and "<b>" not in said
    assert said.count('<img class="right"') == 2 == said.count('<img class="wrong"')


@pytest.mark.parametrize(("psnr", "width"), [(31.25, 100), (15.625, 50), (math.inf, 100), (0.0, 0), (math.nan, 0)])
def test_bars_are_as_long_as_their_number_says(psnr: float, width: int):
    rows = [DENSE, QUANTIZED, replace(QUANTIZED, psnr_db=psnr)]
    flat = torch.zeros(1, 3, 8, 8)
    said = page("", "", [Column(row, flat, [True]) for row in rows], PROMPTS[:1], [])
    assert re.findall(r"width: (\S+)%", said) == ["100", str(width)]


def test_pictures_that_are_all_the_same_have_full_bars():
    same = Column(replace(QUANTIZED, psnr_db=math.inf), torch.zeros(1, 3, 8, 8), [True])
    said = page("", "", [replace(same, row=DENSE), same, same], PROMPTS[:1], [])
    assert re.findall(r"width: (\S+)%", said) == ["100", "100"]


def test_table(tmp_path: Path):
    assert QUANTIZED.cells(DENSE) == ["SVDQuant INT4", "a8", "31.2 dB", "0.988", "50 %", "1.23 %", "4.0 ms",
                                      "1.00 MiB, 4.0x", "2.00 MiB, 2.0x"]
    assert DENSE.cells(DENSE) == ["16 bit", "16 bit", "", "", "75 %", "", "8.0 ms", "4.00 MiB", "4.00 MiB"]
    lines = table.text([DENSE, QUANTIZED]).splitlines()
    assert lines[0].split()[:2] == ["weights", "activations"] and len(lines) == 3
    table.write_csv([DENSE, QUANTIZED], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["psnr_db"]) == 31.25 and rows[1]["recipe"] == "svdquant-int4" and rows[0]["psnr_db"] == "inf"
