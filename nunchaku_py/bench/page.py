"""One page of HTML with everything in it, for readers who know nothing of this project; it fetches nothing."""
from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape

from .job import OURS
from .rows import HEADER, Row, gigabytes, notes, seconds

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e22; --faint: #70757d; --paper: #fff; --line: #e3e5e8; --ours: #eaf1fc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --faint: #9ba0a8; --paper: #16181b; --line: #2d3035; --ours: #1d2a40; }
}
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, dd, li { max-width: 46rem; } .faint, dd { color: var(--faint); } dt { margin-top: .6rem; font-weight: 600; }
dd { margin-left: 0; } .lead { font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .45rem 1.2rem .45rem 0; text-align: left; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { padding-left: .6rem; }
td.note { white-space: normal; min-width: 16rem; max-width: 24rem; color: var(--faint); font-size: .9rem; }
tr.ours { background: var(--ours); }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
"""
ABOUT = """A diffusion model makes an image in a number of steps, and each step runs one large network, the denoiser.
Usually its weights are numbers of 16 bit. nunchaku-py keeps most of them in 4 bit, and the part that 4 bit hold badly
in a thin 16-bit branch beside them (SVDQuant). This page compares both, and other packages where they are installed,
on one machine: how much memory each needs and how fast each is."""
MEANINGS = (
    ("contender", "who ran. “16 bit” is the model as diffusers runs it in bfloat16. “nunchaku-py a8” are 4-bit weights "
     "with inputs of the layers rounded to 8 bit while it runs; a4: to 4 bit; a16: not rounded. The others are "
     "packages with 4-bit or 8-bit weights, in the settings that their names say"),
    ("memory", "of the denoiser: the bytes of all tensors that it holds while it is ready to run. Less is better"),
    ("less by", "the memory in 16 bit divided by this one. Greater is better"),
    ("step", "one denoising step: one call of the denoiser, or two where the model's guidance makes two. The median of "
     "the rounds, and in brackets the first and third quartile. Less is better"),
    ("speed", "how many times as fast as 16 bit a step is: the ratio is taken within each round, and its median and "
     "quartiles are shown. Greater is better; below 1 is slower"),
    ("image", "of a pipeline: from the prompt to the picture, with text encoders and decoder, measured. Of a model "
     "alone: the usual number of steps times the step, computed (~); with text encoders and decoder only where their "
     "times are said below. Less is better"),
    ("load", "from the files on disk until the model is ready on its device. Files that were just written or read are "
     "still in the system's memory, so a first load from a cold disk takes longer. Less is better"),
    ("peak memory", "on a GPU: the most that PyTorch took of its memory. On a CPU: the most that the whole process "
     "had, with Python, PyTorch, what a step computes, and what loading takes for a while. Less is better"),
)
CAVEATS = (
    "Each contender has a process of its own. After a warm-up that does not count they take turns, A B A B …, so that "
    "what disturbs a shared machine disturbs all of them. Believe ratios whose quartiles are close, and times less: "
    "machines differ from hour to hour.",
    "“~” marks what was computed rather than measured, and ratios of contenders that did not fit into memory beside "
    "16 bit and so ran at another time.",
    "Nothing here says how good pictures are.",
)
RANDOM = ("Where weights are random, of each kind of block one was drawn, quantized, and copied into memory of its own "
          "for the others. Neither time nor memory depends on what the weights are; pictures do, so none is shown.")


def page(rows: Sequence[Row], picture: bytes | None) -> str:
    first = rows[0]
    title = f"{first.subject}: speed and memory in 16 bit and in 4 bit"
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
<p class="lead">{escape(' '.join(results(rows)))}</p>
<p class="faint">{escape(ABOUT)}</p>
{_image(picture, title)}
<h2>Numbers</h2>
<div class="wide">{_numbers(rows)}</div>
{''.join(f'<p class="faint">{escape(said)}.</p>' for said in notes(rows))}
<h2>What was measured</h2>
<div class="wide">{_facts(rows)}</div>
<h2>What the columns mean</h2>
<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(meaning)}.</dd>' for name, meaning in MEANINGS)}</dl>
<h2>How to read them</h2>
<ul>{''.join(f'<li>{escape(said)}</li>' for said in caveats(first))}</ul>
<h2>Every round</h2>
<p class="faint">Seconds of a step in each round, in order.</p>
<div class="wide">{_rounds(rows)}</div>
</body>
</html>
"""


def results(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for each of our rows."""
    dense = rows[0]
    for row in rows:
        if row.contender != OURS or row.step_s == "":
            continue
        memory = (f", {row.times_less:.1f} times less than the {gigabytes(dense.denoiser_bytes)} in 16 bit"
                  if isinstance(row.times_less, float) else "")
        speed = ""
        if isinstance(row.speedup, float):
            times = max(row.speedup, 1 / row.speedup)
            compared = f"{times:.2f} times as {'fast' if row.speedup >= 1 else 'long'}"
            speed = f", {compared} as in 16 bit ({seconds(dense.step_s)})"
        yield (f"With {row.label} the denoiser takes {gigabytes(row.denoiser_bytes)}{memory}; a step takes "
               f"{seconds(row.step_s)}{speed}.")
    if dense.memory_is == "computed":
        yield "In 16 bit the model does not fit into the memory that was free here."


def caveats(row: Row) -> Iterator[str]:
    yield from CAVEATS[:2]
    if "random" in row.weights:
        yield RANDOM
    yield CAVEATS[2]


def _image(picture: bytes | None, title: str) -> str:
    if picture is None:
        return ""
    data = base64.b64encode(picture).decode()
    return f'<img alt="{escape(title, quote=True)}, as bars" src="data:image/png;base64,{data}">'


def _numbers(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    body = "".join(_line(row) for row in rows if row.step_s != "")
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _line(row: Row) -> str:
    kind = ' class="ours"' if row.contender == OURS else ""
    return f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row.cells())}</tr>\n"


def _facts(rows: Sequence[Row]) -> str:
    first = rows[0]
    backends = "; ".join(dict.fromkeys(row.backends for row in rows if row.backends))
    facts = [("model", first.subject), ("weights", first.weights),
             ("4-bit format", ", ".join(dict.fromkeys(row.format for row in rows if row.format))),
             ("image", f"{first.width} × {first.height} pixels, {first.steps} steps"),
             ("one call", f"a batch of {first.batch}, {first.text_tokens} tokens of text"
              if first.text_tokens != "" else "as the pipeline calls it"),
             ("text encoders, decoder", f"{seconds(first.text_s)}, {seconds(first.decoder_s)}: once an image, in 16 bit"
              if first.text_s != "" else ""),
             ("device", first.device), ("CPU", f"{first.cpu}, {first.threads} threads"), ("kernels", first.kernels),
             ("operators of nunchaku-py", backends), ("versions", first.versions),
             ("packages", ", ".join(dict.fromkeys(row.package for row in rows if row.step_s != ""))),
             ("date", f"{first.date} UTC")]
    return "<table>" + "".join(f'<tr><th>{escape(name)}</th><td class="note">{escape(said)}</td></tr>\n'
                               for name, said in facts if said) + "</table>"


def _rounds(rows: Sequence[Row]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(row.label)}</th><td>{escape(row.rounds_s)}</td></tr>\n"
                               for row in rows if row.rounds_s) + "</table>"


