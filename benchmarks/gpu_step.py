"""Steps of whole models on a GPU in turns, eager or compiled: the contenders, their memory, errors and rows."""
from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import BASELINE
from benchmarks.gpu import GpuRow
from benchmarks.gpu_models import Architecture
from benchmarks.timing import Clock, Spread, Timed, interleave, sentence
from nunchaku_py.demo.measure import relative_error

EAGER, COMPILED = "eager", "compile"
FP8 = "torchao fp8 row-wise"
ROUNDS, SLOW = 5, 10.0  # at least so many; a call slower than SLOW seconds is made once
GRAPHS = torch._dynamo.config.recompile_limit  # that torch makes of one function; all contenders share their blocks'


def key_of(contender: str, run: str) -> str:
    return f"{contender}, {run}"


OVER = {"speedup": key_of(BASELINE, EAGER), "speedup_compiled": key_of(BASELINE, COMPILED),
        "speedup_fp8": key_of(FP8, COMPILED)}  # column → whom it is over


@dataclass
class Row(GpuRow):
    model: str
    blocks: str
    distinct: int
    batch: int
    pixels: int
    tokens: int
    attention: str
    contender: str
    run: str
    mode: str = ""
    weights: str = ""  # as linears in mode a8 hold them
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
    speedup_fp8: float | str = ""  # over torchao's fp8 compiled
    speedup_fp8_low: float | str = ""
    speedup_fp8_high: float | str = ""
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
        for column, baseline in OVER.items():
            if ratio := timed.speedup(key, baseline):
                values = {column: ratio.median, f"{column}_low": ratio.low, f"{column}_high": ratio.high}
                vars(self).update(values)

    def line(self) -> str:
        """For people: the figures that matter."""
        over = "  ".join(f"{value:.2f}x {name}" for name, value in (
            ("bf16", self.speedup), ("bf16 compiled", self.speedup_compiled), ("fp8 compiled", self.speedup_fp8))
            if value)
        took = f"{self.ms:9.2f} ms ({self.ms_low:.2f}-{self.ms_high:.2f})" if self.ms else "no figure"
        peak = f"peak {self.peak_bytes / 1e9:.2f} GB" if self.peak_bytes else ""
        error = f"error {100 * self.error:.2f} %" if isinstance(self.error, float) else ""
        return "  ".join(filter(None, (f"{self.model} {self.pixels}²", f"{self.contender} ({self.mode})", self.run,
                                       took, over, peak, error, self.note)))


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


@dataclass
class Contender:
    """A model, or why there is none. runs: how it is meant to run."""

    name: str
    mode: str = "bf16"
    weights: str = ""
    runs: Sequence[str] = (EAGER, COMPILED)
    model: nn.Module | None = None
    reason: str = ""
    loaded: int | str = ""
    backends: str = ""
    compiled: dict[nn.Module, Any] = field(default_factory=dict)  # block → what its call becomes

    def make(self, build: Callable[[], nn.Module], device: Device, clock: Clock) -> None:
        """Its model, or the reason why there is none."""
        before, started = device.held(), time.monotonic()
        if clock.left() <= 0:
            self.reason = clock.note
            return
        try:
            self.model = build()
            device.clean()
            self.loaded = device.held() - before if device.on_gpu else ""
        except Exception as refusal:
            self.model, self.reason = None, sentence(refusal)
        print(f"{self.name}: {self.reason or f'made in {time.monotonic() - started:.1f} s'}", flush=True)

    def compile(self, names: Sequence[str], compiler: str) -> None:
        """Its blocks of these names, each by itself."""
        for block in map(self.model.get_submodule, names):
            block.compile(fullgraph=True, dynamic=False, backend=compiler)
            self.compiled[block], block._compiled_call_impl = block._compiled_call_impl, None

    def step(self, inputs: dict[str, Any], run: str) -> Tensor:
        for block, call in self.compiled.items():
            block._compiled_call_impl = call if run == COMPILED else None
        return self.model(**inputs, return_dict=False)[0]


class Measuring:
    """All contenders at one size, eager or compiled."""

    def __init__(self, args: argparse.Namespace, what: Architecture, device: Device, clock: Clock,
                 found: Sequence[Contender], pixels: int, run: str) -> None:
        self.args, self.what, self.device, self.clock, self.found = args, what, device, clock, found
        self.pixels, self.run = pixels, run
        self.inputs: dict[str, Any] = {}
        self.exact: Tensor | None = None  # what bf16 eager gives
        self.before = 0  # graphs made before these
        self.notes: dict[str, str] = {one.name: one.reason for one in found if one.reason}
        self.notes |= {one.name: f"meant for {' and '.join(one.runs)} only" for one in found
                       if run not in one.runs and not one.reason}

    @torch.no_grad()
    def rows(self, columns: dict[str, Any]) -> Iterator[Row]:
        own = {one.name: Row(**columns, pixels=self.pixels, tokens=self.what.tokens(self.pixels), contender=one.name,
                             run=self.run, mode=one.mode, weights=one.weights, loaded_bytes=one.loaded,
                             backends=one.backends) for one in self.found}
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
            self.inputs = self.what.inputs(bf16.model, self.pixels, self.args.device)
            self.exact = bf16.step(self.inputs, EAGER).float()
        except Exception as refusal:
            self.notes[bf16.name] = sentence(refusal)
        if self.run == COMPILED:
            torch._dynamo.reset()  # graphs of other sizes count towards the limit of graphs
            self.before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

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
        """How many graphs that made, and how long the first step took. The limit of graphs is for every contender."""
        stats, started = torch._dynamo.utils.counters["stats"], time.monotonic()
        before = stats["unique_graphs"]
        one.compile(self.what.block_names, self.args.compiler)
        with torch._dynamo.config.patch(recompile_limit=GRAPHS + before - self.before):
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
