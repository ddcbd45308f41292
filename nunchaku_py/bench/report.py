"""What is left of a run: the table, a CSV, a picture, and a page."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .rows import Row, text, write_csv

TABLE, PICTURE, PAGE = "table.csv", "bench.png", "index.html"


def write(rows: Sequence[Row], out: Path) -> Iterator[str]:
    """Writes everything; yields what is to be said."""
    from .page import page

    yield f"\n{text(rows)}\n"
    write_csv(rows, out / TABLE)
    picture, said = drawn(rows, out)
    (out / PAGE).write_text(page(rows, picture), encoding="utf-8")
    yield f"table: {out / TABLE}   page: {out / PAGE}   {said}"


def drawn(rows: Sequence[Row], out: Path) -> tuple[bytes | None, str]:
    """The picture as it was written, or why there is none."""
    try:
        from .picture import png
    except ImportError:
        return None, "no picture: it needs Pillow, pip install 'nunchaku-py[pipelines]'"
    made = png(rows)
    (out / PICTURE).write_bytes(made)
    return made, f"picture: {out / PICTURE}"
