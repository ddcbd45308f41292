"""One step of FLUX.1-dev's transformer, or of SDXL's UNet, on a GPU: bf16 and torchao's FP8 beside our modes, eager and
compiled; speed, memory and error.

    python -m benchmarks.gpu_pipeline --out pipeline.csv
    python -m benchmarks.gpu_pipeline --model sdxl --out sdxl.csv
    python -m benchmarks.gpu_pipeline --out pipeline.csv --tiny --device cpu      a dry run

The architectures are the real ones, FLUX.1 with as many blocks as fit the GPU in all contenders together; weights and
inputs are random. SDXL's step has a batch of 2, as classifier-free guidance makes it of one image (--batch). Of each
kind of block --distinct are drawn and really quantized (to nearest, with a low-rank branch, no search), and the others
are copies of these in memory of their own, in bf16 as in 4 bits. So `error`, of the output against bf16 eager at the
same input, is that of this model: it says that the same thing was computed, not how good a recipe is on trained
weights, and copies err alike where different blocks would not.

Attention is the same on all sides: diffusers' own, of which DIFFUSERS_ATTN_BACKEND chooses the backend. All are called
in turn, A B C A B C …, and ratios are taken within a round. What is compiled is compiled block by block (fullgraph),
as diffusers' compile_repeated_blocks does, so that SDXL's convolutions stay eager on all sides; bf16 eager runs again
in these rounds. torch.compile makes graphs of ours for every block that differs from the others in its smoothing or
branch, and gives up after eight: with copies it makes few, and the note of a row says how many.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

import nunchaku_py as nq
from benchmarks.contenders import BASELINE, OURS
from benchmarks.flux_size import TEXT
from benchmarks.gpu import NO_GPU, provenance
from benchmarks.gpu_linears import HELD
from benchmarks.gpu_models import (
    TINY,
    TINY_UNET,
    Architecture,
    Flux,
    Sdxl,
    blocks_that_fit,
    default_mode,
    fp8_copy,
    quantized_copy,
)
from benchmarks.gpu_step import COMPILED, EAGER, FP8, ROUNDS, Contender, Device, Measuring, Row
from benchmarks.rows import RowFile
from benchmarks.timing import Clock
from nunchaku_py.bench.quick import CHOICES
from nunchaku_py.bench.random_models import random_model
from nunchaku_py.site import auto_weights
from nunchaku_py.swap import quantized_sites

CLIP = 77  # tokens of SDXL's prompt
ROUNDS_SECONDS = 10.0  # of measuring at once
OF_OURS = {"auto": ("auto", "auto"), "a8-int8": ("a8", "int8"), "a8-int4": ("a8", "int4"), "a4": ("a4", "auto")}
CHOSEN = ("fp8", "auto", "a8-int8", "a8-int4")


# ----------------------------------------------------------------------------------------------------------- contenders
def contenders(args: argparse.Namespace, what: Architecture, device: Device, clock: Clock) -> list[Contender]:
    """bf16, and those asked for, made of it."""
    bf16 = Contender(BASELINE)
    bf16.make(lambda: random_model(what.empty(), args.distinct, args.device), device, clock)
    found = [bf16]
    if "fp8" in args.contenders:
        found.append(Contender(FP8, "fp8", runs=(COMPILED,)))  # eager, its quantization is many small kernels
        found[-1].make(_of(bf16, partial(fp8_copy, what)), device, clock)
    known: dict[tuple[str, str], str] = {}  # (mode, weights) → who runs so
    for name in (name for name in OF_OURS if name in args.contenders):
        found.append(ours(args, name, known))
        if not found[-1].reason:
            found[-1].make(_of(bf16, partial(_quantized, what, args, found[-1])), device, clock)
    return found


def ours(args: argparse.Namespace, name: str, known: dict[tuple[str, str], str]) -> Contender:
    """What it is on this device; not made where another is the same."""
    asked, weights = OF_OURS[name]
    mode = default_mode(CHOICES[args.recipe], args.device) if asked == "auto" else asked
    weights = "" if mode != "a8" else auto_weights(torch.device(args.device)) if weights == "auto" else weights
    label = f"{OURS} {name.replace('-', ', weights ')}"
    same = known.setdefault((mode, weights), label)
    return Contender(label, mode, weights, reason="" if same == label else f"the same as {same} on this device")


def _of(bf16: Contender, build: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        if bf16.model is None:
            raise RuntimeError("there is no bf16 model to quantize")
        return build(bf16.model)
    return made


def _quantized(what: Architecture, args: argparse.Namespace, one: Contender, model: nn.Module) -> nn.Module:
    made = quantized_copy(what, model, CHOICES[args.recipe], one.mode, one.weights or "auto", args.distinct)
    one.backends = ", ".join(dict.fromkeys(f"{found.op} {found.backend}" for found in nq.explain(made)))
    one.weights = held(made)
    return made


def held(model: nn.Module) -> str:
    """How its linears in mode a8 really hold their weights."""
    return ", ".join(sorted({HELD.get(site.packed.residency, "int4") for site in quantized_sites(model)
                             if site.packed and site.packed.mode == "a8"}))


# ------------------------------------------------------------------------------------------------------------------ CLI
def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV, which is written anew")
    parser.add_argument("--model", choices=("flux", "sdxl"), default="flux")
    parser.add_argument("--contenders", nargs="+", choices=("fp8", *OF_OURS), default=CHOSEN, help="beside bf16")
    parser.add_argument("--seconds", type=float, default=240.0, help="of the whole run; what it does not reach is said."
                        " A call or compilation that has begun is finished")
    parser.add_argument("--rounds-seconds", type=float, default=ROUNDS_SECONDS,
                        help=f"of measuring each size; never below {ROUNDS} rounds")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="of flux; default: what fits")
    parser.add_argument("--batch", type=int, default=2, help="of sdxl; 2: with classifier-free guidance")
    parser.add_argument("--distinct", type=int, default=1, help="different blocks of each kind, 0: all")
    parser.add_argument("--pixels", type=int, nargs="+", help="sides of images; default: 1024")
    parser.add_argument("--recipe", choices=CHOICES, default="quick-int4")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, of flux 1 + 2 blocks: for a dry run")
    args = parser.parse_args(argv)
    args.pixels = args.pixels or [64 if args.tiny else 1024]
    return args


def architecture(args: argparse.Namespace) -> Architecture:
    if args.model == "sdxl":
        return Sdxl(args.batch, 8, TINY_UNET) if args.tiny else Sdxl(args.batch, CLIP)
    if args.blocks or args.tiny:
        return Flux(*(args.blocks or (1, 2)), *((8, TINY) if args.tiny else (TEXT, {})))
    if torch.device(args.device).type != "cuda":
        raise SystemExit("--blocks: off a GPU say how many of each kind, or --tiny")
    return Flux(*blocks_that_fit(torch.cuda.mem_get_info()[0], kinds(args)), TEXT)


def kinds(args: argparse.Namespace) -> list[str]:
    """What all contenders hold at once, as gpu_models.BYTES names it."""
    known: dict[tuple[str, str], str] = {}
    for name in (name for name in OF_OURS if name in args.contenders):
        ours(args, name, known)
    return ["bf16", *(["fp8"] if "fp8" in args.contenders else []), *(" ".join(filter(None, one)) for one in known)]


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    device, clock, what = Device(args.device), Clock(args.seconds), architecture(args)
    found = contenders(args, what, device, clock)
    columns = {**provenance(args.device), "model": what.name, "blocks": what.blocks, "distinct": args.distinct,
               "batch": what.batch, "attention": f"diffusers {os.environ.get('DIFFUSERS_ATTN_BACKEND', 'native')}"}
    for pixels in args.pixels:
        for run in (EAGER,) if args.no_compile else (EAGER, COMPILED):
            yield from Measuring(args, what, device, clock, found, pixels, run).rows(columns)


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
