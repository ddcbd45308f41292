"""Linears on a GPU beside cuBLAS in bf16, on FLUX.1's shapes: `python -m benchmarks.gpu_ops --out ops.csv`.

Ours is what a layer costs: quantizing its input with the branch's h, then the product. So are the INT8 and FP8 linears
of torch, unless their name says "product only". All run as CUDA graphs over several sets of random operands, of which
ours alone are larger than the caches, in turns A B C A B C …; medians of rounds, ratios within rounds. `error` is of
the bf16 product of the same weight. Who refuses, fails or comes too late has a row that says why. The rows of 4608
tokens come first; at the end stands what gpu_bars makes of all.

    python -m benchmarks.gpu_ops --out ops.csv --tiny --device cpu      a dry run
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_bars
from benchmarks.contenders import BASELINE
from benchmarks.gpu import INT8_PEAK, NO_GPU, GpuRow, provenance
from benchmarks.gpu_linears import SPREAD, Contender, Operands, Ready, Refused, contenders
from benchmarks.gpu_turns import Turn, in_turns, turn_of
from benchmarks.rows import RowFile, read
from benchmarks.timing import Clock, Spread, Timed, sentence
from nunchaku_py.demo.measure import relative_error

# N, K. "qkv together" is one linear of that size; our three projections are three, of which a launch runs all.
SHAPES = {"qkv": (3072, 3072), "up": (12288, 3072), "down": (3072, 12288), "qkv together": (9216, 3072),
          "single.out": (3072, 15360)}
TINY = {"tiny": (256, 128)}
ROWS, TINY_ROWS = (4608, 4096, 512), (32,)
ROUNDS = 7


@dataclass
class Row(GpuRow):
    shape: str
    m: int
    n: int
    k: int
    contender: str
    mode: str = ""
    format: str = ""
    weights: str = ""  # what ours holds between calls
    backend: str = ""
    rounds: int | str = ""
    ms: float | str = ""
    ms_low: float | str = ""
    ms_high: float | str = ""
    tops: float | str = ""
    int8_peak: float | str = ""  # tops as a part of the GPU's in INT8
    speedup: float | str = ""  # over bf16
    speedup_low: float | str = ""
    speedup_high: float | str = ""
    error: float | str = ""
    held_bytes: int | str = ""
    note: str = ""
    rounds_ms: str = ""

    def fill(self, timed: Timed) -> None:
        if not (values := timed.rounds.get(self.contender)):
            return
        took = Spread.of([1e3 * value for value in values])
        self.rounds, self.rounds_ms = len(values), " ".join(f"{1e3 * value:.5g}" for value in values)
        self.ms, self.ms_low, self.ms_high = took.median, took.low, took.high
        self.tops = 2e-9 * self.m * self.n * self.k / took.median
        self.int8_peak = self.tops / INT8_PEAK[self.device] if self.device in INT8_PEAK else ""
        if ratio := timed.speedup(self.contender, BASELINE):
            self.speedup, self.speedup_low, self.speedup_high = ratio.median, ratio.low, ratio.high


class Case:
    """One product, by everybody."""

    def __init__(self, on: Operands, taking_part: Sequence[Contender], clock: Clock) -> None:
        self.on, self.taking_part, self.clock = on, taking_part, clock
        self.turns: dict[str, Turn] = {}
        self.exact: Tensor | None = None  # what bf16 says

    @torch.no_grad()
    def rows(self, columns: dict[str, str], shape: str, rounds: int) -> list[Row]:
        torch.manual_seed(0)
        torch._dynamo.reset()  # graphs of other shapes count towards the limit of graphs
        on = self.on
        found = [Row(**columns, shape=shape, m=on.m, n=on.n, k=on.k, contender=one.name, mode=one.mode,
                     format=one.format) for one in self.taking_part]
        for one, row in zip(self.taking_part, found, strict=True):
            self.prepare(one, row)
        timed = in_turns(self.turns, rounds)
        for row in found:
            row.fill(timed)
        return found

    def prepare(self, one: Contender, row: Row) -> None:
        """Its graph and its error, or the reason why there are none."""
        if self.clock.left() <= 0:
            row.note = self.clock.note
            return
        try:
            ready = one.build(self.on)
            row.backend, row.weights, row.held_bytes, row.note = (
                ready.backend, ready.weights, ready.held, ready.note)
            row.error = self.error(one, ready)
            self.turns[one.name] = turn_of(ready.run, self.on.sets, self.on.device)
        except Refused as reason:
            row.note = str(reason)
        except Exception as failure:
            row.note = sentence(failure)

    def error(self, one: Contender, ready: Ready) -> float | str:
        y = ready.y().float()
        if one.name == BASELINE:
            self.exact = y
        if not y.isfinite().all():
            raise Refused("its output is not finite")
        return relative_error(y, self.exact) if self.exact is not None else ""


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    clock, columns = Clock(args.seconds), provenance(args.device)
    taking_part = contenders(not args.no_compile)
    for m in args.rows:
        for shape, (n, k) in args.shapes.items():
            on = Operands(m, n, k, args.device, args.compiler, args.spread)
            yield from Case(on, taking_part, clock).rows(columns, shape, args.rounds)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV, which is written anew")
    parser.add_argument("--rows", type=int, nargs="+", help="tokens; default: 4608 4096 512")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=240.0, help="of the whole run; what it does not reach is said")
    parser.add_argument("--no-compile", action="store_true", help="without what torch.compile makes")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small shape: for a dry run")
    args = parser.parse_args(argv)
    args.shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes or SHAPES}
    args.rows, args.spread = args.rows or (TINY_ROWS if args.tiny else ROWS), 0 if args.tiny else SPREAD
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    with RowFile.create(args.out, Row) as file:
        for row in all_rows(args):
            file.write(row)
            print(row.line(), flush=True)
    print(gpu_bars.summary(read([args.out])))


if __name__ == "__main__":
    main()
