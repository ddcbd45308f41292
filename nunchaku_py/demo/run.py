"""The demonstration itself: a trained miniature, quantized, saved, reloaded, painted with, measured and shown."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.held import held_bytes
from ..bench.machine import kernels
from ..calibrate import State, capture_states
from ..checkpoint import load, save
from ..errors import NunchakuError
from ..folders import write_call
from ..progress import Progress
from ..quantize import quantize
from ..site import MODES
from ..swap import set_mode
from . import shipped
from .checker import Checker, agreement, load_checker
from .measure import outputs, paint, psnr, relative_error, same_bits, ssim, step_seconds
from .page import page
from .scenes import described
from .sheet import Column, Sheet
from .table import Row, text, write_csv

# The modes that each recipe paints in. Rounding is there to show what a4 loses without the branch and calibration. a16
# is compared after reloading, but not painted: next to a8 it shows nothing new.
RECIPES = {"rtn-int4": ("a4",), "rtn-nvfp4": ("a4",), "svdquant-int4": ("a4", "a8"), "svdquant-nvfp4": ("a4", "a8")}
RANK = 16  # the recipes' 32 belongs to layers twelve times as wide
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Extent:
    """How much is done. steps: None for the pipeline's usual number; calibration: prompts, none of them painted."""

    prompts: int
    shown: int
    steps: int | None
    calibration: int
    states: int
    probes: int


FULL = Extent(prompts=64, shown=8, steps=None, calibration=16, states=32, probes=8)
QUICK = Extent(prompts=2, shown=2, steps=2, calibration=2, states=2, probes=1)


@dataclass(frozen=True)
class Subject:
    """The 16-bit pipeline, and all that each variant is given alike. states: calibration; probes: inputs compared."""

    name: str
    about: str
    pipe: Any
    call: dict[str, Any]
    prompts: list[str]
    seed: int
    states: list[State]
    probes: list[State]
    expected: Tensor
    checker: Checker

    def denoiser(self, pipe: Any) -> nn.Module:
        return getattr(pipe, shipped.DENOISERS[self.name])


@dataclass(frozen=True)
class Variant:
    """A pipeline that was saved and reloaded; `differs`: the modes in which it is not what was saved."""

    recipe: str
    pipe: Any
    folder: Path
    seconds: float
    differs: tuple[str, ...]


def run_demo(name: str, out: Path, seed: int = 0, extent: Extent = FULL) -> bool:
    """Prints and writes everything; False if a reloaded model differed."""
    started = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NunchakuError(f"{out}: cannot be written: {error}") from error
    subject = _subject(name, seed, extent)
    variants = [_variant(subject, recipe, out) for recipe in RECIPES]
    columns = list(_columns(subject, variants))
    print(f"\n{text([column.row for column in columns])}\n")
    _write(subject, columns, out, extent.shown)
    alike = not any(variant.differs for variant in variants)
    print(_closing(variants, out, time.monotonic() - started))
    return alike


def captions(count: int, seed: int, held_out: bool) -> list[str]:
    """Held out: what is painted; else what is calibrated on. The two have nothing in common but the seed."""
    return described(count, f"{seed} {held_out}", held_out)[1]


def _subject(name: str, seed: int, extent: Extent) -> Subject:
    pipe = shipped.pipeline(name, DTYPE)
    call = shipped.CALLS[name] | ({} if extent.steps is None else {"num_inference_steps": extent.steps})
    model = getattr(pipe, shipped.DENOISERS[name])
    prompts = captions(extent.prompts, seed, held_out=True)
    about = _about(name, pipe, call, len(prompts))
    print(f"{about}\n", flush=True)
    known = captions(extent.calibration, seed, held_out=False)
    states = capture_states(pipe, model, known, extent.states, seed=seed + len(prompts), **call)
    probes = capture_states(pipe, model, prompts[:extent.probes], extent.probes, seed=seed, show=False, **call)
    return Subject(name, about, pipe, call, prompts, seed, states, probes, outputs(model, probes), load_checker())


def _variant(subject: Subject, recipe: str, out: Path) -> Variant:
    """Quantize the pipeline afresh, save it, load it."""
    pipe, folder = shipped.pipeline(subject.name, DTYPE), out / recipe
    rounding = recipe.startswith("rtn")
    started = time.monotonic()
    quantize(pipe, recipe, None if rounding else subject.states, rank=None if rounding else RANK, seed=subject.seed)
    seconds = time.monotonic() - started
    save(pipe, folder)
    write_call(folder, shipped.CALLS[subject.name])
    again = load(folder, dtype=DTYPE)
    again.set_progress_bar_config(disable=True)
    differs = tuple(mode for mode in MODES if not _alike(subject, pipe, again, mode))
    print(f"{recipe}: quantized in {seconds:.1f} s, saved, reloaded; "
          f"{'DIFFERS in ' + ', '.join(differs) if differs else 'the same bits in ' + ', '.join(MODES)}", flush=True)
    return Variant(recipe, again, folder, seconds, differs)


def _alike(subject: Subject, saved: Any, again: Any, mode: str) -> bool:
    for pipe in (saved, again):
        set_mode(pipe, mode)
    return same_bits(subject.denoiser(saved), subject.denoiser(again), subject.probes[:1])


def _columns(subject: Subject, variants: Sequence[Variant]) -> Iterator[Column]:
    """16 bit first, then every variant in its modes."""
    paintings = 1 + sum(len(RECIPES[variant.recipe]) for variant in variants)
    work = paintings * len(subject.prompts) * subject.call["num_inference_steps"]
    with Progress(work, "paint and measure", leave=False) as progress:
        progress.say("16 bit")
        dense = _dense(subject, progress.advance)
        yield dense
        for variant in variants:
            for mode in RECIPES[variant.recipe]:
                progress.say(f"{variant.recipe} {mode}")
                set_mode(variant.pipe, mode)
                yield _quantized(subject, variant, mode, dense.pictures, progress.advance)


def _dense(subject: Subject, step_done: Callable[[int], None]) -> Column:
    model = subject.denoiser(subject.pipe)
    pictures, right = _painted(subject, subject.pipe, step_done)
    return Column(Row("", "", float("inf"), 1.0, sum(right) / len(right), 0.0, _step_ms(subject, subject.pipe),
                      held_bytes(model), _disk(shipped.folder(subject.name) / shipped.DENOISERS[subject.name])),
                  pictures, right)


def _quantized(subject: Subject, variant: Variant, mode: str, dense: Tensor, step_done: Callable[[int], None]
               ) -> Column:
    """The variant in this mode, which is set."""
    model = subject.denoiser(variant.pipe)
    pictures, right = _painted(subject, variant.pipe, step_done)
    error = relative_error(outputs(model, subject.probes), subject.expected)
    return Column(Row(variant.recipe, mode, psnr(pictures, dense).mean().item(), ssim(pictures, dense).mean().item(),
                      sum(right) / len(right), error, _step_ms(subject, variant.pipe), held_bytes(model),
                      _disk(variant.folder / shipped.DENOISERS[subject.name]), variant.seconds), pictures, right)


def _painted(subject: Subject, pipe: Any, step_done: Callable[[int], None]) -> tuple[Tensor, list[bool]]:
    pictures = paint(pipe, subject.prompts, subject.seed, subject.call, step_done)
    return pictures, agreement(subject.checker, pictures, subject.prompts)


def _step_ms(subject: Subject, pipe: Any) -> float:
    return 1000 * step_seconds(subject.denoiser(pipe), subject.probes[0])


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _about(name: str, pipe: Any, call: dict[str, Any], prompts: int) -> str:
    weights = sum(p.numel() for p in getattr(pipe, shipped.DENOISERS[name]).parameters())
    return (f"{name}: {type(pipe).__name__} with {weights / 1e6:.1f} M weights in its denoiser, "
            f"{call['width']}x{call['height']} pixels, {call['num_inference_steps']} steps, {prompts} prompts; "
            f"{torch.get_num_threads()} CPU threads, {kernels()}")


def _write(subject: Subject, columns: Sequence[Column], out: Path, shown: int) -> None:
    notes = (f"Numbers over {len(subject.prompts)} prompts, each with a pair of colour and shape that the model never "
             "saw in training; every row starts from the same noise.",
             "SVDQuant calibrated on other prompts. PSNR and SSIM against 16 bit.")
    title = f"{subject.name}: 16 bit and 4 bit"
    prompts = subject.prompts[:shown]
    shortened = [replace(column, pictures=column.pictures[:shown], right=column.right[:shown]) for column in columns]
    Sheet(shortened, prompts, title, notes).drawn().save(out / "sheet.png", optimize=True)
    (out / "index.html").write_text(page(title, subject.about, shortened, prompts, notes), encoding="utf-8")
    write_csv([column.row for column in columns], out / "table.csv")


def _closing(variants: Sequence[Variant], out: Path, seconds: float) -> str:
    wrong = [f"{variant.recipe} in {mode}" for variant in variants for mode in variant.differs]
    reload = f"RELOADED MODELS DIFFER: {', '.join(wrong)}" if wrong else \
        "every reloaded model equals the saved one bit for bit"
    return f"""PSNR, SSIM: of the pictures against 16 bit; as said: pictures that show what their prompt says
error: of the denoiser's output against 16 bit; step: one denoiser call, which in a model so small is mostly overhead
memory, on disk: of the denoiser; {reload}; {seconds:.0f} s

pictures: {out / 'sheet.png'}   page: {out / 'index.html'}   table: {out / 'table.csv'}
checkpoints: {', '.join(str(variant.folder) for variant in variants)}"""
