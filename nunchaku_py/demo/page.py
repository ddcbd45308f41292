"""One page of HTML with everything in it: numbers, pictures as data, styles; it fetches nothing."""
from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from math import isfinite

from torch import Tensor

from .sheet import Column, pil
from .table import HEADER, Row

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e22; --faint: #70757d; --paper: #fff; --line: #e3e5e8; --bar: #b9cdf0;
  --right: #2e8c54; --wrong: #ce3e3a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --faint: #9ba0a8; --paper: #16181b; --line: #2d3035; --bar: #2c4a7c;
    --right: #4cc27e; --wrong: #ef6b66; }
}
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, dd { max-width: 46rem; } p.faint, dd { color: var(--faint); } dt { margin-top: .5rem; } dd { margin-left: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; white-space: nowrap; vertical-align: middle; }
.numbers td, .numbers th { border-bottom: 1px solid var(--line); }
.numbers td:nth-child(n+3) { font-variant-numeric: tabular-nums; }
.bar { display: block; height: 4px; background: var(--bar); }
.pictures th { font-size: .8rem; font-weight: 600; padding-right: .6rem; white-space: normal; vertical-align: bottom; }
.pictures td { padding: 0 .6rem .6rem 0; }
.pictures td:first-child { white-space: normal; min-width: 13rem; font-size: .9rem; }
img { display: block; width: 128px; height: 128px; image-rendering: pixelated; border-bottom: 4px solid var(--right); }
img.wrong { border-color: var(--wrong); }
"""
MEANINGS = (
    ("PSNR, SSIM", "how near the pictures are to those of the 16-bit model from the same noise; mean over all prompts"),
    ("as said", "part of the pictures that show what their prompt says, as a small trained network sees it"),
    ("error", "of one call of the denoiser against 16 bit, from the same input"),
    ("step", "one call of the denoiser for one picture, the median of a few; a model so small is all overhead and says "
             "little of the speed of a large one"),
    ("memory, on disk", "of the denoiser, with what its mode needs beside the weights; and how much less than 16 bit"),
)


def page(title: str, about: str, columns: Sequence[Column], prompts: Sequence[str], notes: Sequence[str]) -> str:
    rows = [column.row for column in columns]
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in MEANINGS)
    said = "".join(f'<p class="faint">{escape(note)}</p>' for note in notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
<h2>Numbers</h2>
<div class="wide">{_numbers(rows)}</div>
<dl>{meanings}</dl>
<h2>Pictures</h2>
<p class="faint">Each row from the same noise. The line below a picture is green where it shows what its prompt says,
and red where it does not.</p>
<div class="wide">{_pictures(columns, prompts)}</div>
{said}
</body>
</html>
"""


def _numbers(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    best = max([1.0, *(row.psnr_db for row in rows if isfinite(row.psnr_db))])
    body = "".join(f"<tr>{_cells(row, rows[0], best)}</tr>\n" for row in rows)
    return f'<table class="numbers"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'


def _cells(row: Row, dense: Row, best: float) -> str:
    cells = [escape(cell) for cell in row.cells(dense)]
    if row.recipe:  # the length of a bar says what the number says
        share = min(1.0, max(0.0, row.psnr_db / best))  # endless where nothing differs
        cells[2] += f'<span class="bar" style="width: {100 * share:.0f}%"></span>'
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _pictures(columns: Sequence[Column], prompts: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(_name(column.row))}</th>" for column in columns)
    body = "".join(f"<tr><td>{escape(prompt)}</td>{''.join(_picture(column, i, prompt) for column in columns)}</tr>\n"
                   for i, prompt in enumerate(prompts))
    return f'<table class="pictures"><thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'


def _name(row: Row) -> str:
    return f"{row.weights} {row.mode}".strip()


def _picture(column: Column, i: int, prompt: str) -> str:
    kind = "right" if column.right[i] else "wrong"
    label = escape(f"{_name(column.row)}: {prompt}", quote=True)
    return f'<td><img class="{kind}" alt="{label}" title="{label}" src="{_data(column.pictures[i])}"></td>'


def _data(picture: Tensor) -> str:
    held = io.BytesIO()
    pil(picture).save(held, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
