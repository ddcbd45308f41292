"""Seconds of linears and of what surrounds them, ours and everybody's, on the layer shapes of real models.

    python -m benchmarks.ops --threads 2 --out benchmarks/results/ops_cpu.csv     FLUX.1; --shapes '*' for all models
    python -m benchmarks.ops --quick                                              two shapes, a minute or two

Every instruction set and every number of threads has a process of its own, in which torch is measured beside ours.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.chains import Chain, Linear
from benchmarks.contenders import (
    BASELINE,
    OURS,
    Contender,
    Ready,
    chain_contenders,
    chains_of,
    fresh,
    linear_contenders,
    missing_packages,
    weight_only_contenders,
)
from benchmarks.rows import Row, RowFile, line_of
from benchmarks.shapes import RESOLUTIONS, Case, cases, small
from benchmarks.timing import Call, Evict, Timed, interleave, sentence
from nunchaku_py.bench.machine import installed

SUITES = ("machine", "linear", "chains", "weight_only")
QUICK = ("flux/double.qkv", "flux/double.up", "flux/single.modulation")
ERROR_ROWS = 64  # of the output, that the error is taken on
FEW_ROWS = (1, 4, 16)  # of weight-only products
GUESSED_RATE = 3e11  # operations a second, of an average contender


@dataclass(frozen=True)
class Bench:
    """A chain with its input, and how long its contenders are measured."""

    case: Case
    chain: Chain
    x: torch.Tensor
    seconds: float
    limit: float

    @staticmethod
    def of(case: Case, kind: type[Chain], args: argparse.Namespace) -> Bench:
        torch.manual_seed(0)
        chain = kind(case.layer, case.m).requires_grad_(False)
        for linear in chain.children():
            linear.weight.normal_(std=linear.in_features**-0.5)
        return Bench(case, chain.bfloat16(), chain.example(case.m).bfloat16(), args.seconds, args.limit)

    @torch.no_grad()
    def rows(self, contenders: Sequence[Contender], op: str = "", before: Call | None = None) -> Iterator[Row]:
        ready, errors, notes = self.build(contenders)
        timed = interleave({name: one.call for name, one in ready.items()}, self.seconds, self.limit, before)
        for contender in contenders:
            name = contender.name
            row = self.row(contender, op or self.chain.op, notes.get(name) or timed.notes.get(name, ""))
            row.error = errors.get(name, "")
            if name in ready:
                self.fill(row, ready[name], timed)
            yield row

    def build(self, contenders: Sequence[Contender]) -> tuple[dict[str, Ready], dict[str, float], dict[str, str]]:
        """Those that could be built and called once, their errors, and the refusals of the others."""
        ready, errors, notes = {}, {}, {}
        reference = fresh(self.chain).float()(self.x[:ERROR_ROWS].float())
        for contender in contenders:
            name = contender.name
            try:
                made = contender.build(fresh(self.chain), self.x)
                y = made.call()
                if made.gives_y:
                    errors[name] = ((y[:ERROR_ROWS].float() - reference).norm() / reference.norm()).item()
                ready[name] = made
            except Exception as refusal:  # whatever another package raises is its answer, and is written down
                notes[name] = sentence(refusal)
        return ready, errors, notes

    def row(self, contender: Contender, op: str, note: str) -> Row:
        layer, mine = self.case.layer, contender.package == OURS
        return Row(**machine.provenance(), isa=machine.our_isa() if mine else machine.torch_isa(), op=op,
                   shape=self.case.label, m=self.case.m, n=layer.n, k=layer.k, contender=contender.name,
                   version="" if mine else installed(contender.package), note=note)

    def fill(self, row: Row, ready: Ready, timed: Timed) -> None:
        row.backend, row.stored_bytes, row.held_bytes = ready.backend, ready.stored, ready.held
        if row.contender not in timed.rounds:
            return
        whole = ready.gives_y  # a part of the work has a time, but neither a rate nor a ratio
        row.fill_times(timed.rounds[row.contender], timed.speedup(row.contender, BASELINE) if whole else None)
        if whole:
            row.tops = self.chain.flops(self.case.m) / (1e9 * row.median_ms)
            row.gbps = ready.stored / (1e6 * row.median_ms)


# ------------------------------------------------------------------------------------------------------------ suites
def rows_of(args: argparse.Namespace, main: bool) -> Iterator[Row]:
    """All rows of one process; only the main one has the peers and all of our settings."""
    peers = main and not args.no_peers
    if "machine" in args.suites and main:
        yield from machine_rows()
    chosen = chosen_cases(args)
    for index, case in enumerate(chosen, 1):
        print(f"[{index}/{len(chosen)}] {case.label}: {case.m}x{case.layer.k} -> {case.layer.n}", flush=True)
        if case.layer.role == "modulation":
            yield from Bench.of(case, Linear, args).rows(weight_only_contenders(peers), "weight_only",
                                                         Evict(machine.evict_bytes()))
            continue
        if "linear" in args.suites:
            contenders = linear_contenders(len(case.layer.parts) > 1, peers, main)
            yield from Bench.of(case, Linear, args).rows(contenders)
        for kind in chains_of(case.layer) if "chains" in args.suites else ():
            yield from Bench.of(case, kind, args).rows(chain_contenders(peers))


def machine_rows() -> Iterator[Row]:
    """What the machine can do at most."""
    bandwidth, how = machine.read_bandwidth()
    yield Row(**machine.provenance(), isa=machine.torch_isa(), op="read bandwidth", contender=how, gbps=bandwidth)
    for unit, gops in machine.peaks().items():
        yield Row(**machine.provenance(), isa=unit, op="peak", contender=f"{unit}, from registers", tops=gops / 1e3)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    found = cases(args.shapes, args.resolutions) if {"linear", "chains"} & set(args.suites) else []
    if args.tokens:
        found = list({(case.layer.n, case.layer.parts): Case(case.layer, args.tokens, f"{case.label}, cut")
                      for case in found}.values())
    few = FEW_ROWS[:1] if args.quick else FEW_ROWS
    return found + (small(args.shapes, few) if "weight_only" in args.suites else [])


# ----------------------------------------------------------------------------------------------------------- processes
def work(args: argparse.Namespace) -> None:
    """One process: measure, print and append."""
    torch.set_num_threads(args.threads[0])
    with RowFile(args.out) as file:
        for row in rows_of(args, main=args.worker == "auto"):
            file.write(row)
            print(line_of(row), flush=True)


def lead(args: argparse.Namespace) -> int:
    """Start one process after another; one that dies costs its own rows only."""
    for missing in () if args.no_peers else missing_packages():
        print(missing)
    wanted = [(count, isa) for count in args.threads for isa in args.isa or ["auto", *machine.available_isas()[1:]]]
    print(f"{len(chosen_cases(args))} shapes, about {minutes(args, wanted):.0f} minutes on a quiet machine")
    print(f"processes: {', '.join(f'{isa} with {count} threads' for count, isa in wanted)}; rows go to {args.out}")
    RowFile.create(args.out)
    started, failed = time.monotonic(), 0
    for count, isa in wanted:
        own = ["--threads", str(count), "--worker", isa, "--out", str(args.out)]  # the last of two counts
        code = subprocess.run([sys.executable, "-m", "benchmarks.ops", *sys.argv[1:], *own], cwd=machine.ROOT,
                              env=environment(count, isa)).returncode
        failed += code != 0
        print(f"{isa}, {count} threads: {'done' if code == 0 else f'ended with status {code}'}, "
              f"{(time.monotonic() - started) / 60:.1f} minutes so far", flush=True)
    return failed


def environment(threads: int, isa: str) -> dict[str, str]:
    forced = {} if isa == "auto" else {machine.ISA_VARIABLE: isa}
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(machine.ROOT), **forced}


def minutes(args: argparse.Namespace, wanted: Sequence[tuple[int, str]]) -> float:
    """A guess: every contender of a bench takes a second to prepare, and five calls at GUESSED_RATE before it is timed.
    """
    seconds = 0.0
    for case in chosen_cases(args):
        benches = 1 + ("chains" in args.suites) * len(chains_of(case.layer))
        calls = 10 * case.m * case.layer.n * case.layer.k / GUESSED_RATE
        for _, isa in wanted:
            seconds += benches * (args.seconds + (15 if isa == "auto" and not args.no_peers else 5) * (1 + calls))
    return seconds / 60


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--shapes", nargs="+", help="globs of model/layer, see shapes.py; default: flux/*")
    parser.add_argument("--resolutions", type=int, nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--isa", nargs="+", help="auto, avx512, avx2, portable, …; default: all that run here")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring each shape; never below 3 rounds")
    parser.add_argument("--limit", type=float, default=8.0, help="a call slower than this is not repeated")
    parser.add_argument("--tokens", type=int, default=0, help="instead of the real number of rows, for a dry run")
    parser.add_argument("--no-peers", action="store_true", help="torch and ours only")
    parser.add_argument("--quick", action="store_true", help="two shapes and a modulation layer, 512² only, 3 seconds")
    parser.add_argument("--out", type=Path, default=Path("ops.csv"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.shapes = args.shapes or list(QUICK if args.quick else ("flux/*",))
    if args.quick:
        args.resolutions, args.seconds = [512], min(args.seconds, 3.0)
    return args


if __name__ == "__main__":
    chosen = arguments()
    sys.exit(work(chosen) if chosen.worker else lead(chosen))
