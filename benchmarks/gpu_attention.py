"""8-bit attention on a GPU beside torch's: `python -m benchmarks.gpu_attention --out attention.csv`.

Ours is what a call costs, quantizing q, k and v included. q, k and v are views of (B,T,H,D), as diffusers' are; sets of
them together are larger than the caches. All run as CUDA graphs, in turns A B C A B C …; medians of rounds, ratios
within rounds, over the fastest of torch's. `error` is of the formula in float64, on the first heads. Who refuses, fails
or comes too late has a row that says why.

    python -m benchmarks.gpu_attention --out attention.csv --tiny --device cpu      a dry run
"""
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import NO_GPU, GpuRow, provenance
from benchmarks.gpu_linears import SPREAD, Refused
from benchmarks.gpu_turns import Turn, in_turns, turn_of
from benchmarks.rows import RowFile
from benchmarks.timing import Clock, Spread, Timed, sentence
from nunchaku_py import ops
from nunchaku_py.demo.measure import relative_error
from nunchaku_py.ops import AttentionSpec

Operands = tuple[Tensor, Tensor, Tensor]
# heads, tokens, keys, channels of a head: FLUX.1 at 1024², SDXL's largest, and that with the text of a prompt.
SHAPES = {"flux": (24, 4608, 4608, 128), "4096 x 64": (24, 4096, 4096, 64), "cross": (24, 4096, 77, 64)}
TINY = {"tiny": (2, 40, 50, 64)}
ROUNDS = 9
HEADS_CHECKED = 2
TORCH = "torch sdpa "
TORCHS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
          "efficient": SDPBackend.EFFICIENT_ATTENTION}
OURS = {"nunchaku-py int8, P·V fp8": "fp8", "nunchaku-py int8, P·V 16 bit": "16bit"}


@dataclass
class Row(GpuRow):
    shape: str
    heads: int
    tokens: int
    keys: int
    channels: int
    contender: str
    backend: str = ""
    rounds: int | str = ""
    ms: float | str = ""
    ms_low: float | str = ""
    ms_high: float | str = ""
    tops: float | str = ""
    baseline: str = ""  # the fastest of torch's
    speedup: float | str = ""  # over it
    speedup_low: float | str = ""
    speedup_high: float | str = ""
    error: float | str = ""
    note: str = ""
    rounds_ms: str = ""

    def fill(self, timed: Timed, baseline: str) -> None:
        if not (values := timed.rounds.get(self.contender)):
            return
        took = Spread.of([1e3 * value for value in values])
        self.rounds, self.rounds_ms = len(values), " ".join(f"{1e3 * value:.5g}" for value in values)
        self.ms, self.ms_low, self.ms_high = took.median, took.low, took.high
        self.tops = 4e-9 * self.heads * self.tokens * self.keys * self.channels / took.median
        if baseline and (ratio := timed.speedup(self.contender, baseline)):
            self.baseline = baseline
            self.speedup, self.speedup_low, self.speedup_high = ratio.median, ratio.low, ratio.high


@dataclass
class Problem:
    heads: int
    tokens: int
    keys: int
    channels: int
    device: str
    spread: int

    @cached_property
    def sets(self) -> list[Operands]:
        size = 2 * self.heads * (self.tokens + 2 * self.keys) * self.channels
        return [self.drawn() for _ in range(max(2, -(-self.spread // size)))]

    def drawn(self) -> Operands:
        """(B,H,T,D) views of (B,T,H,D)."""
        rows = self.tokens, self.keys, self.keys
        return tuple(torch.randn(1, n, self.heads, self.channels, device=self.device).bfloat16().transpose(1, 2)
                     for n in rows)

    @cached_property
    def exact(self) -> Tensor:
        """What the formula says of the first heads of the first set, one by one: a head's scores are large."""
        q, k, v = (tensor[:, :HEADS_CHECKED].double() for tensor in self.sets[0])
        scale = self.channels**-0.5
        return torch.cat([(q[:, i] @ k[:, i].mT * scale).softmax(-1) @ v[:, i] for i in range(q.shape[1])])


# ----------------------------------------------------------------------------------------------------------- contenders
def ours(products: str) -> Callable[..., Tensor]:
    spec = AttentionSpec(products)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (why := ops.attention.explain(q, k, v, spec)["triton"]) != "can run":
            raise Refused(f"no kernel: {why}")
        with ops.backend("triton"):
            return ops.attention(q, k, v, spec)

    return run


def torchs(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def contenders() -> dict[str, Callable[..., Tensor]]:
    return {**{TORCH + name: torchs(backend) for name, backend in TORCHS.items()},
            **{name: ours(products) for name, products in OURS.items()}}


@torch.no_grad()
def rows_of(shape: str, problem: Problem, columns: dict[str, str], clock: Clock, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    turns: dict[str, Turn] = {}
    found = [Row(**columns, shape=shape, heads=problem.heads, tokens=problem.tokens, keys=problem.keys,
                 channels=problem.channels, contender=name) for name in contenders()]
    for row, run in zip(found, contenders().values(), strict=True):
        prepare(row, run, problem, clock, turns)
    timed = in_turns(turns, rounds)
    theirs = [name for name in turns if name.startswith(TORCH)]
    fastest = min(theirs, key=lambda name: statistics.median(timed.rounds[name]), default="")
    for row in found:
        row.fill(timed, fastest)
    return found


def prepare(row: Row, run: Callable[..., Tensor], problem: Problem, clock: Clock, turns: dict[str, Turn]) -> None:
    """Its error and its graph, or the reason why there are none."""
    if clock.left() <= 0:
        row.note = clock.note
        return
    try:
        o = run(*problem.sets[0])[0, :HEADS_CHECKED].double()
        if not o.isfinite().all():
            raise Refused("its output is not finite")
        row.error = relative_error(o, problem.exact)
        row.backend = "torch" if row.contender.startswith(TORCH) else "triton"
        turns[row.contender] = turn_of(lambda i: run(*problem.sets[i]), len(problem.sets), problem.device)
    except Refused as reason:
        row.note = str(reason)
    except Exception as failure:
        row.note = sentence(failure)


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    clock, columns = Clock(args.seconds), provenance(args.device)
    for shape, sizes in args.shapes.items():
        yield from rows_of(shape, Problem(*sizes, args.device, args.spread), columns, clock, args.rounds)


def summary(row: Row) -> str:
    """A row in a line, for people."""
    what = f"{row.shape:9}  {row.contender:28}"
    if row.ms == "":
        return f"{what}  no figure: {row.note}"
    over = f"{row.speedup:5.2f}x {row.baseline} ({row.speedup_low:.2f}-{row.speedup_high:.2f})" if row.baseline else ""
    return f"{what}  {row.ms:8.4f} ms  {row.tops:7.1f} TOPS  error {100 * row.error:.2f} %  {over}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV, which is written anew")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the whole run; what it does not reach is said")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small shape: for a dry run")
    args = parser.parse_args(argv)
    args.shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes or SHAPES}
    args.spread = 0 if args.tiny else SPREAD
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    with RowFile.create(args.out, Row) as file:
        for row in all_rows(args):
            file.write(row)
            print(summary(row), flush=True)


if __name__ == "__main__":
    main()
