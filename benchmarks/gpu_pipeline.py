"""One step of FLUX.1-dev's transformer on a GPU: bf16 beside our modes, eager and compiled; speed, memory and error.

    python -m benchmarks.gpu_pipeline --out pipeline.csv
    python -m benchmarks.gpu_pipeline --out pipeline.csv --tiny --device cpu      a dry run

The architecture is the real one, with as many blocks as fit the GPU in bf16 and in our modes together; weights and
inputs are random. Of each kind of block --distinct are drawn and really quantized (to nearest, with a low-rank branch,
no search), and the others are copies of these in memory of their own, in bf16 as in 4 bits. So `error`, of the output
against bf16 eager at the same input, is that of this model: it says that the same thing was computed, not how good a
recipe is on trained weights, and copies err alike where different blocks would not.

Attention is the same on both sides: diffusers' own, of which DIFFUSERS_ATTN_BACKEND chooses the backend. All are called
in turn, A B C A B C …, and ratios are taken within a round. What is compiled is compiled block by block (fullgraph),
as diffusers' compile_repeated_blocks does; bf16 eager runs again in these rounds. torch.compile makes graphs of ours
for every block that differs from the others in its smoothing or branch, and gives up after eight: with copies it makes
few, and the note of a row says how many.
"""
from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nunchaku_py as nq
from benchmarks.contenders import BASELINE, OURS
from benchmarks.flux_size import TEXT, step_inputs
from benchmarks.gpu import NO_GPU, GpuRow, provenance
from benchmarks.gpu_models import TINY, blocks_that_fit, default_mode, quantized_copy, random_model
from benchmarks.quick import CHOICES
from benchmarks.rows import RowFile
from benchmarks.timing import Spread, Timed, interleave, sentence
from nunchaku_py.demo.measure import relative_error

EAGER, COMPILED = "eager", "compile"
PATCH = 16  # pixels of an image token's side
ROUNDS_SECONDS, ROUNDS, SLOW = 10.0, 5, 10.0  # of measuring at once; at least so many; a call slower than SLOW is one


@dataclass
class Row(GpuRow):
    double: int
    single: int
    distinct: int
    pixels: int
    tokens: int
    attention: str
    contender: str
    run: str
    mode: str = ""
    backends: str = ""
    rounds: int | str = ""
    ms: float | str = ""
    ms_low: float | str = ""
    ms_high: float | str = ""
    speedup: float | str = ""  # over bf16 eager
    speedup_low: float | str = ""
    speedup_high: float | str = ""
    speedup_compiled: float | str = ""  # over bf16 compiled
    speedup_compiled_low: float | str = ""
    speedup_compiled_high: float | str = ""
    loaded_bytes: int | str = ""  # on the GPU, of this model alone
    peak_bytes: int | str = ""  # while it makes a step; what the other models hold is taken off
    error: float | str = ""
    note: str = ""

    def fill(self, timed: Timed) -> None:
        key = key_of(self.contender, self.run)
        if key not in timed.rounds:
            return
        took = Spread.of([1e3 * value for value in timed.rounds[key]])
        self.rounds, self.ms, self.ms_low, self.ms_high = len(timed.rounds[key]), took.median, took.low, took.high
        if plain := timed.speedup(key, key_of(BASELINE, EAGER)):
            self.speedup, self.speedup_low, self.speedup_high = plain.median, plain.low, plain.high
        if compiled := timed.speedup(key, key_of(BASELINE, COMPILED)):
            self.speedup_compiled, self.speedup_compiled_low = compiled.median, compiled.low
            self.speedup_compiled_high = compiled.high


def key_of(contender: str, run: str) -> str:
    return f"{contender}, {run}"


class Clock:
    """How long the whole run may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def note(self) -> str:
        return f"not reached within {self.seconds:g} s"


class Device:
    """Waiting for it, and its memory: on a GPU only."""

    def __init__(self, name: str) -> None:
        self.name, self.on_gpu = name, torch.device(name).type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    @contextmanager
    def peak(self, into: list[int]) -> Iterator[None]:
        """Appends how far memory rose above what was held before."""
        held = self.held()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()
            into.append(torch.cuda.max_memory_allocated() - held)


# ----------------------------------------------------------------------------------------------------------- contenders
@dataclass
class Contender:
    """A model, or why there is none."""

    name: str
    mode: str = "bf16"
    model: nn.Module | None = None
    reason: str = ""
    loaded: int | str = ""
    backends: str = ""
    compiled: dict[nn.Module, Any] = field(default_factory=dict)  # block → what its call becomes

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def compile(self, compiler: str) -> None:
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=compiler)
            self.compiled[block], block._compiled_call_impl = block._compiled_call_impl, None

    def step(self, inputs: dict[str, Any], run: str) -> Tensor:
        for block, call in self.compiled.items():
            block._compiled_call_impl = call if run == COMPILED else None
        return self.model(**inputs, return_dict=False)[0]


def contenders(args: argparse.Namespace, device: Device, clock: Clock) -> list[Contender]:
    """bf16, and ours made of it in a4 and in the mode that "auto" is here."""
    recipe, config = CHOICES[args.recipe], TINY if args.tiny else {}
    bf16, a4, auto = found = [Contender(BASELINE), Contender(f"{OURS} a4", "a4"),
                              Contender(f"{OURS} auto", default_mode(recipe, args.device))]

    def quantized(mode: str) -> nn.Module:
        if bf16.model is None:
            raise RuntimeError("there is no bf16 model to quantize")
        return quantized_copy(bf16.model, recipe, mode, args.distinct, **config)
    make(bf16, partial(random_model, args.double, args.single, args.distinct, args.device, **config), device, clock)
    make(a4, partial(quantized, "a4"), device, clock)
    if auto.mode == "a4":
        auto.reason = "auto is a4 on this device"
    else:
        make(auto, partial(quantized, auto.mode), device, clock)
    return found


def make(one: Contender, build: Callable[[], nn.Module], device: Device, clock: Clock) -> None:
    """Its model, or the reason why there is none."""
    before, started = device.held(), time.monotonic()
    if clock.left() <= 0:
        one.reason = clock.note
        return
    try:
        one.model = build()
        one.backends = backends_of(one.model) if one.name != BASELINE else ""
        device.clean()
        one.loaded = device.held() - before if device.on_gpu else ""
    except Exception as refusal:
        one.model, one.reason = None, sentence(refusal)
    print(f"{one.name}: {one.reason or f'made in {time.monotonic() - started:.1f} s'}", flush=True)


def backends_of(model: nn.Module) -> str:
    """What the ops of its linears run on."""
    return ", ".join(dict.fromkeys(f"{one.op} {one.backend}" for one in nq.explain(model)))


# ------------------------------------------------------------------------------------------------------------ measuring
class Measuring:
    """All contenders at one size, eager or compiled."""

    def __init__(self, args: argparse.Namespace, device: Device, clock: Clock, found: Sequence[Contender], pixels: int,
                 run: str) -> None:
        self.args, self.device, self.clock, self.found = args, device, clock, found
        self.pixels, self.run, self.tokens = pixels, run, (pixels // PATCH)**2
        self.inputs: dict[str, Any] = {}
        self.exact: Tensor | None = None  # what bf16 eager gives
        self.notes: dict[str, str] = {one.name: one.reason for one in found if one.reason}

    @torch.no_grad()
    def rows(self, columns: dict[str, Any]) -> Iterator[Row]:
        own = {one.name: Row(**columns, pixels=self.pixels, tokens=self.tokens + self.args.text, contender=one.name,
                             run=self.run, mode=one.mode, loaded_bytes=one.loaded, backends=one.backends)
               for one in self.found}
        self.begin()
        ready = [one for one in self.found if self.first(one, own[one.name])]
        timed = self.timed(ready)
        for name, row in own.items():
            row.fill(timed)
            row.note = "; ".join(filter(None, (self.notes.get(name), timed.notes.get(key_of(name, self.run)))))
            yield row

    def begin(self) -> None:
        """Inputs, and what bf16 eager makes of them."""
        bf16 = self.found[0]
        if bf16.model is None or self.clock.left() <= 0:
            return
        try:
            self.device.clean()
            self.inputs = {name: value.to(self.args.device) for name, value in
                           step_inputs(bf16.model, self.tokens, self.args.text).items()}
            self.exact = bf16.step(self.inputs, EAGER).float()
        except Exception as refusal:
            self.notes[bf16.name] = sentence(refusal)
        if self.run == COMPILED:
            torch._dynamo.reset()  # graphs of other sizes count towards the limit of graphs

    def first(self, one: Contender, row: Row) -> bool:
        """The first call, which may compile, fail or come too late; memory and error. Whether there are to be more."""
        if one.model is None or self.notes.get(one.name):
            return False
        if self.clock.left() <= 0 or not self.inputs:
            self.notes[one.name] = self.clock.note if self.clock.left() <= 0 else "there are no inputs"
            return False
        try:
            self.device.clean()
            if self.run == COMPILED:
                self.notes[one.name] = self.compile(one)
            rise: list[int] = []
            with self.device.peak(rise):
                y = one.step(self.inputs, self.run)
            row.peak_bytes = one.loaded + rise[0] if rise else ""
            row.error = relative_error(y.float(), self.exact) if self.exact is not None else ""
        except Exception as refusal:
            self.notes[one.name] = sentence(refusal)
            return False
        return True

    def compile(self, one: Contender) -> str:
        """How many graphs that made, and how long the first step took."""
        stats, started = torch._dynamo.utils.counters["stats"], time.monotonic()
        before = stats["unique_graphs"]
        one.compile(self.args.compiler)
        one.step(self.inputs, COMPILED)
        self.device.wait()
        return f"compiled {stats['unique_graphs'] - before} graphs in {time.monotonic() - started:.0f} s"

    def timed(self, ready: Sequence[Contender]) -> Timed:
        """In turn; beside compiled models bf16 eager too, if it ran."""
        runs = [(one, self.run) for one in ready]
        if self.run == COMPILED and ready and self.exact is not None:
            runs.insert(0, (self.found[0], EAGER))
        calls = {key_of(one.name, run): partial(self.call, one, run) for one, run in runs}
        return interleave(calls, min(self.args.rounds_seconds, max(0.0, self.clock.left())), SLOW, least=ROUNDS)

    def call(self, one: Contender, run: str) -> None:
        one.step(self.inputs, run)
        self.device.wait()


# ------------------------------------------------------------------------------------------------------------------ CLI
def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV, which is written anew")
    parser.add_argument("--seconds", type=float, default=240.0, help="of the whole run; what it does not reach is said."
                        " A call or compilation that has begun is finished")
    parser.add_argument("--rounds-seconds", type=float, default=ROUNDS_SECONDS,
                        help=f"of measuring each size; never below {ROUNDS} rounds")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="default: what fits")
    parser.add_argument("--distinct", type=int, default=1, help="different blocks of each kind, 0: all")
    parser.add_argument("--pixels", type=int, nargs="+", help="sides of images; default: 1024 512")
    parser.add_argument("--recipe", choices=CHOICES, default="quick-int4")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of width 128, 1 + 2 blocks: for a dry run")
    args = parser.parse_args(argv)
    args.pixels = args.pixels or ([64] if args.tiny else [1024, 512])
    args.text = 8 if args.tiny else TEXT
    return args


def choose_blocks(args: argparse.Namespace) -> None:
    """Sets args.double and args.single."""
    if args.blocks or args.tiny:
        args.double, args.single = args.blocks or (1, 2)
        return
    if torch.device(args.device).type != "cuda":
        raise SystemExit("--blocks: off a GPU say how many of each kind, or --tiny")
    mode = default_mode(CHOICES[args.recipe], args.device)
    args.double, args.single = blocks_that_fit(torch.cuda.mem_get_info()[0], {"bf16", "a4", mode})


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    device, clock = Device(args.device), Clock(args.seconds)
    choose_blocks(args)
    found = contenders(args, device, clock)
    columns = {**provenance(args.device), "double": args.double, "single": args.single, "distinct": args.distinct,
               "attention": f"diffusers {os.environ.get('DIFFUSERS_ATTN_BACKEND', 'native')}"}
    for run in (EAGER,) if args.no_compile else (EAGER, COMPILED):
        for pixels in args.pixels:
            yield from Measuring(args, device, clock, found, pixels, run).rows(columns)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    with RowFile.create(args.out, Row) as file:
        for row in all_rows(args):
            file.write(row)
            print(row.line(), flush=True)


if __name__ == "__main__":
    main()
