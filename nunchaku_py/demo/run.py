"""The demonstration itself: one 16-bit pipeline, four or five quantized ones, a table."""
from __future__ import annotations

import copy
import csv
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..calibrate import State, capture_states
from ..checkpoint import load, save
from ..errors import NunchakuError
from ..ops.registry import forced_backend
from ..quantize import quantize
from ..site import MODES
from ..swap import set_mode
from .measure import image, outputs, pixels, psnr, relative_error, same_bits, step_seconds
from .models import DEMO, TINY, flux_pipeline

PROMPTS = ("a lighthouse at dusk", "two cats on a red sofa", "a map of an island", "rain on a window")
UNSEEN = "a bicycle against a wall"  # what is measured is another prompt than those calibrated on
RANK = 16  # the recipes' 32 belongs to layers eight times as wide
VARIANTS = (("rtn-int4", False), ("svdquant-int4", False), ("svdquant-int4", True),
            ("svdquant-nvfp4", False), ("svdquant-nvfp4", True))
COLUMNS = (("variant", 28), ("on disk", 16), ("quantized", 10), ("mode", 6), ("step", 9), ("error", 8), ("PSNR", 9),
           ("reload", 0))


@dataclass
class Row:
    """One variant in one mode. error: of the denoiser's output, relative to 16 bit."""

    variant: str
    disk_bytes: int
    smaller: float
    quantize_seconds: float
    mode: str
    step_ms: float
    error: float
    psnr_db: float
    same_bits_after_reload: str

    def cells(self, first: bool) -> list[str]:
        disk = f"{self.disk_bytes / 2**20:.1f} MiB {self.smaller:.2f}x"
        named = [self.variant, disk, f"{self.quantize_seconds:.1f} s"]
        return [*(named if first else [""] * 3), self.mode, f"{self.step_ms:.0f} ms", f"{100 * self.error:.2f} %",
                f"{self.psnr_db:.1f} dB", self.same_bits_after_reload]


@dataclass
class Bench:
    """The 16-bit pipeline and what the others are compared with."""

    pipe: Any
    out: Path
    call: dict[str, Any]
    states: list[State]
    expected: torch.Tensor
    picture: Any
    disk_bytes: int

    def paint(self, pipe: Any, name: str) -> Any:
        made = image(pipe, UNSEEN, 0, **self.call)
        made.save(self.out / "images" / f"{name}.png")
        return made


def run_demo(out: Path, seed: int = 0, tiny: bool = False) -> bool:
    """Prints and writes everything; False if a reloaded model differed."""
    started = time.monotonic()
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NunchakuError(f"{out}: cannot be written: {error}") from error
    bench = _bench(out, seed, tiny)
    rows = []
    print(_line([name for name, _ in COLUMNS]))
    print(_line(["16 bit", f"{bench.disk_bytes / 2**20:.1f} MiB", "", "", _step(bench)]), flush=True)
    for recipe, calibrated in VARIANTS:
        for i, row in enumerate(_variant(bench, recipe, calibrated)):
            print(_line(row.cells(i == 0)), flush=True)
            rows.append(row)
    _write(rows, out / "table.csv")
    alike = all(row.same_bits_after_reload == "same bits" for row in rows)
    print(_closing(bench, rows, out, alike, time.monotonic() - started))
    return alike


def _bench(out: Path, seed: int, tiny: bool) -> Bench:
    pipe = flux_pipeline(TINY if tiny else DEMO, seed)
    side = 128 if tiny else 256
    call = {"num_inference_steps": 4, "height": side, "width": side, "max_sequence_length": 32}
    weights = sum(p.numel() for p in pipe.transformer.parameters())
    print(f"a miniature FLUX: {weights / 1e6:.1f} M random weights, hidden size {pipe.transformer.inner_dim}, "
          f"{side}x{side} pixels, {torch.get_num_threads()} CPU threads, {_operators()}\n")
    pipe.save_pretrained(out / "flux-16bit")
    states = capture_states(pipe, pipe.transformer, [{"prompt": UNSEEN, **call}], 2, seed=99, show=False)
    bench = Bench(pipe, out, call, states, outputs(pipe.transformer, states), None,
                  _disk(out / "flux-16bit" / "transformer"))
    bench.picture = bench.paint(pipe, "16bit")
    return bench


def _variant(bench: Bench, recipe: str, calibrated: bool) -> Iterator[Row]:
    """Quantize a copy, save, reload; then a row for each mode."""
    name = f"{recipe}-{'calibrated' if calibrated else 'data-free'}"
    pipe = bench.pipe.__class__(**{**bench.pipe.components, "transformer": copy.deepcopy(bench.pipe.transformer)})
    pipe.set_progress_bar_config(disable=True)
    data = [{"prompt": prompt, **bench.call} for prompt in PROMPTS] if calibrated else None
    started = time.monotonic()
    quantize(pipe, recipe, data, rank=None if recipe.startswith("rtn") else RANK, states=8, progress=False)
    seconds = time.monotonic() - started
    folder = bench.out / name
    save(pipe.transformer, folder)
    again = load(folder)
    for mode in MODES:
        set_mode(pipe, mode)
        set_mode(again, mode)
        alike = same_bits(pipe.transformer, again, bench.states[:1])
        disk = _disk(folder)
        yield Row(name, disk, bench.disk_bytes / disk, seconds, mode, 1000 * step_seconds(again, bench.states[0]),
                  relative_error(outputs(again, bench.states), bench.expected),
                  psnr(*map(pixels, ([bench.paint(pipe, f"{name}-{mode}")], [bench.picture]))).item(),
                  "same bits" if alike else "DIFFERS")


def _step(bench: Bench) -> str:
    return f"{1000 * step_seconds(bench.pipe.transformer, bench.states[0]):.0f} ms"


def _disk(folder: Path) -> int:
    return sum(os.path.getsize(file) for file in folder.glob("*") if file.is_file())


def _line(cells: list[str]) -> str:
    return "".join(cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=False)).rstrip()


def _operators() -> str:
    if native.module is None or forced_backend() == "torch":
        return "plain PyTorch operators"
    return f"CPU kernels for {native.cpu_isa()}"


def _write(rows: list[Row], path: Path) -> None:
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def _closing(bench: Bench, rows: list[Row], out: Path, alike: bool, seconds: float) -> str:
    reload = "every reloaded model equals the saved one bit for bit" if alike else "A RELOADED MODEL DIFFERS"
    return f"""
{reload}; {len(rows)} rows in {seconds:.0f} s
error: of the denoiser's output against 16 bit, on a prompt that was not calibrated on; PSNR: of the final image
step:  one denoiser call; a model so small says little of the speed of a large one

The weights are random, so the pictures are noise. What the table shows: the whole way from a pipeline to a 4-bit
checkpoint and back works, what it saves on disk, and how far each mode is from 16 bit on the same weights.
images: {out / 'images'}   checkpoints: {out}   table: {out / 'table.csv'}"""
