"""Pictures of the shipped models, quantized: method × format × rank × mode, plain and stressed, beside sdnq.

    python -m benchmarks.quality.pictures                       everything: CSV, summary with the bars, plot
    python -m benchmarks.quality.pictures --quick               a look, in outputs/
    python -m benchmarks.quality.pictures --models tiny-flux --stress stressed
    python -m benchmarks.quality.pictures --report              summary and plot again, from the CSV

Rows are appended as they come. The same command goes on where it was interrupted: what has a row for these weights is
not measured again.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.machine import provenance
from benchmarks.quality import picture_rows
from benchmarks.quality.picture_cells import EXACT, FULL, QUICK, SIXTEEN, Build, Extent, builds
from benchmarks.quality.picture_metrics import compare
from benchmarks.quality.picture_report import write_report
from benchmarks.quality.picture_rows import Key, Row, key_of
from benchmarks.quality.picture_subjects import Quantized, Subject
from nunchaku_py.demo import shipped
from nunchaku_py.demo.checker import load_checker
from nunchaku_py.demo.measure import relative_error
from nunchaku_py.swap import set_mode

ROOT = Path(__file__).resolve().parents[2]
STRESS = ("stressed", "plain")
QUANTIZE, ERROR, PICTURES = 4.0, 0.8, 0.2  # costs that the time left is told by; pictures: of one prompt


class Clock:
    """Says how much is done and how long the rest will take, at the pace so far."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.skipped, self.started = total, 0.0, 0.0, time.monotonic()

    def advance(self, cost: float, measured: bool) -> None:
        self.done += cost
        self.skipped += 0 if measured else cost

    def __str__(self) -> str:
        worked = self.done - self.skipped
        left = (time.monotonic() - self.started) * (self.total - self.done) / worked if worked else 0
        return f"{100 * self.done / self.total:3.0f} %, {left / 60:.0f} min left"


class Bench:
    """Measures one model, plain or stressed."""

    def __init__(self, subject: Subject, known: set[Key]) -> None:
        self.subject, self.known, self.checker = subject, known, load_checker()

    def rows(self, build: Build) -> Iterator[Row]:
        """Of the modes that have none yet."""
        wanted = {mode: self.row(build, mode) for mode in build.modes}
        wanted = {mode: row for mode, row in wanted.items() if key_of(row) not in self.known}
        if not wanted:
            return
        try:
            made = self.subject.quantized(build)
        except Exception as refusal:  # whatever another package raises is its answer, and is written down
            if build.peer is None:
                raise
            made = None
            for row in wanted.values():
                row.note = f"{type(refusal).__name__}: {refusal}"
        for mode, row in wanted.items():
            if made is not None:
                self.measure(build, mode, made, row)
            yield row

    def row(self, build: Build, mode: str) -> Row:
        subject, extent = self.subject, self.subject.extent
        return Row(**provenance(), model=subject.name, weights=subject.weights, method=build.method,
                   stress="stressed" if subject.stressed else "plain", settings=build.settings, format=build.format,
                   rank=build.rank, mode=mode, seed=build.seed, states=extent.steps,
                   prompts=extent.prompts if build.modes[mode] else 0)

    def measure(self, build: Build, mode: str, made: Quantized, row: Row) -> None:
        subject = self.subject
        if build.format:
            set_mode(made.model, mode)
        row.bytes, row.seconds = made.bytes, made.seconds
        row.error = relative_error(subject.measured(made.model), subject.expected)
        if build.modes[mode]:
            found = subject.pictures if build.method == SIXTEEN else subject.painted(made.model)
            for name, value in vars(compare(self.checker, found, subject.pictures, subject.prompts)).items():
                setattr(row, name, value)
        if build.method == SIXTEEN:
            row.note = said(subject)


def said(subject: Subject) -> str:
    """How hard the model's activations are."""
    found = subject.hardness()
    parts = []
    for name in ("channels", "tokens"):
        values = [getattr(one, name) for one in found]
        parts.append(f"{name} {min(values):.1f} to {max(values):.1f}")
    return f"largest over median, {len(found)} inputs: {', '.join(parts)}"


def cost(build: Build, extent: Extent) -> float:
    quantizing = 0.0 if build.method in (SIXTEEN, EXACT) else QUANTIZE
    return quantizing + sum(ERROR * extent.steps / FULL.steps + PICTURES * extent.prompts * pictured
                            for pictured in build.modes.values())


def measure_all(path: Path, models: Sequence[str], stress: Sequence[str], extent: Extent) -> None:
    known = known_rows(path, extent)
    work = [(name, which, build) for name in models for which in stress
            for build in builds(extent, name, which)]
    clock = Clock(sum(cost(build, extent) for _, _, build in work))
    for name, which in dict.fromkeys((name, which) for name, which, _ in work):
        print(f"{name}, {which}", flush=True)
        bench = Bench(Subject(name, which == "stressed", extent), known)
        for build in (build for *subject, build in work if subject == [name, which]):
            found = list(append_all(path, bench.rows(build)))
            clock.advance(cost(build, extent), measured=bool(found))
            for row in found:
                print(f"  {str(build):52} {row.mode:4} {line(row)}   {clock}", flush=True)


def known_rows(path: Path, extent: Extent) -> set[Key]:
    """What needs not be measured again. A file of another extent is refused: its rows are none to compare with."""
    rows = picture_rows.read(path)
    for row in rows:
        if row.states != extent.steps or row.prompts not in (0, extent.prompts):
            raise SystemExit(f"{path}: has rows of {row.states} steps and {row.prompts} prompts, not of {extent.steps} "
                             f"and {extent.prompts}; choose another folder with --out, or delete it")
    return {key_of(row) for row in rows if row.error != ""}  # a refusal may be over by now


def append_all(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        picture_rows.append(path, row)
        yield row


def line(row: Row) -> str:
    if row.error == "":
        return row.note
    looks = f"PSNR {row.psnr:5.2f}  SSIM {row.ssim:.3f}  feature {row.feature:.4f}  Fréchet {row.frechet:.4f}  " \
            f"agreement {100 * row.agreement:.1f} %" if row.psnr != "" else ""
    return f"error {100 * row.error:6.2f} %  {looks}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(shipped.CALLS), default=tuple(shipped.CALLS))
    parser.add_argument("--stress", nargs="+", choices=STRESS, default=STRESS)
    parser.add_argument("--out", type=Path, help="folder of CSV, summary and plot; default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="few methods, few prompts, in outputs/")
    parser.add_argument("--report", action="store_true", help="measure nothing, read the CSV that is there")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    path = (args.out or ROOT / ("outputs" if args.quick else "benchmarks/results")) / "quality_pictures.csv"
    if not args.report:
        measure_all(path, args.models, args.stress, QUICK if args.quick else FULL)
    print(write_report(path))


if __name__ == "__main__":
    main()
