"""The summary of benchmarks.quality.pictures as Markdown, and its plot."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality import picture_plot
from benchmarks.quality.picture_bars import Bar, Table, bars, percent, spread, verdict
from benchmarks.quality.picture_cells import EXACT, FORMATS, FREE, SIXTEEN
from benchmarks.quality.picture_rows import Row, newest, read
from nunchaku_py.site import MODES

MARKS = {True: "met", False: "**missed**", None: "–"}


def write_report(path: Path) -> str:
    """Beside the CSV: .md, and .png where matplotlib is there. Returns what is to be said of it."""
    table = Table(newest(read(path)))
    if not table.rows:
        return f"{path}: no rows"
    found = bars(table)
    path.with_suffix(".md").write_text(page(table, found, path.name), encoding="utf-8")
    drawn = picture_plot.draw(table, path.with_suffix(".png"))
    return "\n".join([*bar_lines(found), "", verdict(found), drawn or f"{path.with_suffix('.md')}, {path.stem}.png"])


def page(table: Table, found: list[Bar], source: str) -> str:
    parts = ["# Pictures of quantized models", "",
             f"Made from `{source}`; how it was measured stands in `benchmarks/quality/README.md`. {provenance(table)}",
             "", "## Bars", "", "Stressed tiny-flux, INT4, W4A4, rank 16, where a line says nothing else. Ratios: mean "
             "over calibrations; the worst one decides. sdnq has seen no data, ours are calibrated, but for "
             f"the rows called '{FREE}'.", "",
             *bar_lines(found), "", verdict(found), ""]
    for model, stress in table.subjects():
        parts += [f"## {model}, {stress}", ""]
        for lines in (sixteen_lines, error_lines, look_lines, peer_lines):
            parts += [*lines(table, model, stress), ""]
    return "\n".join(parts)


def provenance(table: Table) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(getattr(row, name) for row in table.rows))
    return f"Commit {all_of('commit')}, torch {all_of('torch')}, {all_of('cpu')}, until {table.rows[-1].date} UTC."


def bar_lines(found: list[Bar]) -> list[str]:
    lines = (f"| {bar.asked} | {bar.found} | {MARKS[bar.met]} |" for bar in found)
    return ["| asked | found | |", "|---|---|---|", *lines]


def sixteen_lines(table: Table, model: str, stress: str) -> Iterator[str]:
    """What the model is like before it is quantized, as a list."""
    for row in table.pick(model=model, stress=stress, method=EXACT):
        yield f"- 16-bit rounding alone changes the denoiser's output by {percent(row.error)} (against fp32)."
    row = table.looks(model=model, stress=stress, method=SIXTEEN)
    if row is not None:
        yield f"- Its own pictures show what {percent(row.agreement)} of {row.prompts} held-out prompts say."
    for row in table.pick(model=model, stress=stress, method=SIXTEEN)[:1]:
        yield f"- Activations, {row.note}."


def error_lines(table: Table, model: str, stress: str) -> Iterator[str]:
    """Error in % of each method in each mode, mean over seeds and the worst."""
    yield "Error of the denoiser's output along the 16-bit trajectory, %:"
    yield ""
    yield "| method | format | rank | KB | " + " | ".join(MODES) + " |"
    yield "|---" * (4 + len(MODES)) + "|"
    ours = [row for row in table.pick(model=model, stress=stress) if row.format]
    for fmt in FORMATS:
        for method, rank in dict.fromkeys((row.method, row.rank) for row in ours if row.format == fmt):
            same = {"model": model, "stress": stress, "method": method, "format": fmt, "rank": rank}
            cells = [spread(list(table.errors(**same, mode=mode).values())) for mode in MODES]
            size = table.pick(**same)[0].bytes
            yield f"| {method} | {fmt} | {rank} | {size / 1e3:.0f} | {' | '.join(cells)} |"


def look_lines(table: Table, model: str, stress: str) -> Iterator[str]:
    yield "Pictures, against those of the 16-bit model:"
    yield ""
    yield "| method | format | rank | mode | PSNR | SSIM | feature distance | Fréchet | agreement % |"
    yield "|---" * 9 + "|"
    for row in table.pick(model=model, stress=stress):
        if row.psnr != "":
            yield (f"| {named(row)} | {row.format} | {row.rank or ''} | {row.mode} | {row.psnr:.2f} | {row.ssim:.4f} | "
                   f"{row.feature:.4f} | {row.frechet:.4f} | {100 * row.agreement:.1f} |")


def named(row: Row) -> str:
    return f"{row.method}, {row.settings}" if row.settings else row.method


def peer_lines(table: Table, model: str, stress: str) -> Iterator[str]:
    """Each setting of sdnq with ours of the largest rank that fits into its bytes, data-free and calibrated."""
    peers = table.peers(model, stress)
    if not peers:
        return
    yield "| sdnq, data-free, a16 | KB | error % | PSNR | ours | KB | a16 % | a8 % | PSNR a16 | PSNR a8 |"
    yield "|---" * 10 + "|"
    for peer in peers:
        for method, fmt in ((FREE, "int4"), *(("svdquant", fmt) for fmt in FORMATS)):
            fits = [table.fitting(peer, fmt, mode, method) for mode in ("a16", "a8")]
            if None not in fits:
                yield (f"| {peer.settings} | {peer.bytes / 1e3:.0f} | {100 * peer.error:.2f} | {decibel(peer)} | "
                       f"{method}, {fmt}, rank {fits[0].rank} | {fits[0].bytes / 1e3:.0f} | "
                       + " | ".join(f"{100 * row.error:.2f}" for row in fits) + " | "
                       + " | ".join(map(decibel, fits)) + " |")


def decibel(row: Row) -> str:
    return f"{row.psnr:.2f}" if row.psnr != "" else "–"
