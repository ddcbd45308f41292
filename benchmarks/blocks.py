"""Transformer blocks at their real size, random weights: torch bf16 against quantized, the same attention in both.

    python -m benchmarks.blocks --threads 2 --out benchmarks/results/blocks_cpu.csv
    python -m benchmarks.blocks --quick

Peak memory is that of a fresh process which loads the smallest model with this block, 16-bit or quantized, and runs the
block once.
"""
from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nunchaku_py as nq
from benchmarks import machine
from benchmarks.contenders import BASELINE, OURS
from benchmarks.rows import Row, RowFile, line_of
from benchmarks.timing import Call, Timed, interleave
from nunchaku_py.bench.held import read_all
from nunchaku_py.bench.machine import installed, memory
from nunchaku_py.bench.quick import CHOICES

BF16 = torch.bfloat16
QUICK = ("flux.single", "sdxl.640")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class BlockCase:
    """One block inside the smallest model that has it; `inputs` makes its arguments in bf16."""

    label: str
    cls: str
    config: dict[str, Any]
    path: str
    inputs: Callable[[nn.Module, int], Inputs]
    tokens: int  # of the image

    def model(self) -> nn.Module:
        import diffusers

        torch.manual_seed(0)
        return getattr(diffusers, self.cls)(**self.config).bfloat16().eval()


def flux_inputs(model: nn.Module, tokens: int, text: int = 512) -> Inputs:
    """Image tokens on a square, text tokens at the origin, as the pipeline numbers them."""
    width, side = model.inner_dim, max(1, int(tokens**0.5))
    ids = torch.zeros(text + tokens, 3)
    ids[text:, 1] = torch.arange(tokens) // side
    ids[text:, 2] = torch.arange(tokens) % side
    return {"hidden_states": torch.randn(1, tokens, width).to(BF16),
            "encoder_hidden_states": torch.randn(1, text, width).to(BF16),
            "temb": torch.randn(1, width).to(BF16), "image_rotary_emb": model.pos_embed(ids)}


def sdxl_inputs(model: nn.Module, tokens: int) -> Inputs:
    return {"hidden_states": torch.randn(1, tokens, model.config.block_out_channels[0]).to(BF16),
            "encoder_hidden_states": torch.randn(1, 77, model.config.cross_attention_dim).to(BF16)}


def _flux(double: int, single: int) -> dict[str, Any]:
    return {"num_layers": double, "num_single_layers": single, "guidance_embeds": True}


def _sdxl(width: int) -> dict[str, Any]:
    """A UNet of one stage, which holds a BasicTransformerBlock of this width as SDXL has it."""
    return {"block_out_channels": (width,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
            "up_block_types": ("UpBlock2D",), "layers_per_block": 1, "attention_head_dim": (width // 64,),
            "transformer_layers_per_block": (1,), "use_linear_projection": True, "cross_attention_dim": 2048}


SDXL_PATH = "down_blocks.0.attentions.0.transformer_blocks.0"
CASES = {
    "flux.double": BlockCase("FLUX double block, 512²", "FluxTransformer2DModel", _flux(1, 0),
                             "transformer_blocks.0", flux_inputs, 1024),
    "flux.single": BlockCase("FLUX single block, 512²", "FluxTransformer2DModel", _flux(0, 1),
                             "single_transformer_blocks.0", flux_inputs, 1024),
    "sdxl.640": BlockCase("SDXL block of 640, 1024²", "UNet2DConditionModel", _sdxl(640), SDXL_PATH, sdxl_inputs, 4096),
    "sdxl.1280": BlockCase("SDXL block of 1280, 1024²", "UNet2DConditionModel", _sdxl(1280), SDXL_PATH, sdxl_inputs,
                           1024),
    "sdxl.1280.large": BlockCase("SDXL block of 1280, 2048²", "UNet2DConditionModel", _sdxl(1280), SDXL_PATH,
                                 sdxl_inputs, 4096),
}


# --------------------------------------------------------------------------------------------------------------- timing
@torch.no_grad()
def measure(case: BlockCase, args: argparse.Namespace) -> list[Row]:
    """A row for bf16, for the quantized block with fused patterns, and for the one without."""
    model = case.model()
    inputs = case.inputs(model, args.tokens or case.tokens)
    reference = exact_update(model.get_submodule(case.path), inputs)
    quantized = copy.deepcopy(model)
    print("  quantizing", flush=True)
    nq.quantize(quantized, CHOICES[args.recipe], mode=args.mode, progress=False)
    calls = calls_of(case, model, quantized, inputs, args.recipe)
    errors = {name: distance(update_of(call(), inputs), reference) for name, call in calls.items()}
    timed = interleave(calls, args.seconds, args.limit)
    blocks = {name: (model if name == BASELINE else quantized).get_submodule(case.path) for name in calls}
    rows = [row_of(case, name, block, inputs, timed, errors[name]) for name, block in blocks.items()]
    if not args.no_memory:
        fill_peaks(rows, args, {BASELINE: model, OURS: quantized})
    return rows


def calls_of(case: BlockCase, model: nn.Module, quantized: nn.Module, inputs: Inputs, recipe: str) -> dict[str, Call]:
    plain, ours = model.get_submodule(case.path), quantized.get_submodule(case.path)
    set_fusion = getattr(nq, "set_fusion", None)
    found: dict[str, Call] = {BASELINE: lambda: plain(**inputs)}
    if set_fusion is None:
        return {**found, f"{OURS} {recipe}": lambda: ours(**inputs)}

    def run(fused: bool) -> object:
        set_fusion(quantized, fused)  # far below a millisecond, before tens of them
        return ours(**inputs)
    return {**found, f"{OURS} {recipe}, fused": lambda: run(True), f"{OURS} {recipe}, one by one": lambda: run(False)}


def exact_update(block: nn.Module, inputs: Inputs) -> Tensor:
    """What the block adds to its input, in fp32 from the same bf16 weights and inputs."""
    wide = copy.deepcopy(block).float()
    floats = {name: value.float() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return update_of(wide(**floats), inputs)


def update_of(output: Any, inputs: Inputs) -> Tensor:
    """Output less input, of both streams: the residual stream alone would hide every error."""
    streams = list(output) if isinstance(output, tuple) else [output]
    names = ("encoder_hidden_states", "hidden_states") if len(streams) == 2 else ("hidden_states",)
    return torch.cat([(y.float() - inputs[name].float()).flatten() for y, name in zip(streams, names, strict=True)])


def distance(y: Tensor, reference: Tensor) -> float:
    return ((y - reference).norm() / reference.norm()).item()


def row_of(case: BlockCase, name: str, block: nn.Module, inputs: Inputs, timed: Timed, error: float) -> Row:
    held = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    stored = sum(tensor.nbytes for tensor in block.state_dict().values())
    row = Row(**machine.provenance(), isa=machine.torch_isa() if name == BASELINE else machine.our_isa(), op="block",
              shape=case.label, m=inputs["hidden_states"].shape[1], contender=name, stored_bytes=stored,
              held_bytes=held, error=error, note=timed.notes.get(name, ""), version=installed("diffusers"))
    if name in timed.rounds:
        row.fill_times(timed.rounds[name], timed.speedup(name, BASELINE))
    return row


# --------------------------------------------------------------------------------------------------------------- memory
def fill_peaks(rows: Sequence[Row], args: argparse.Namespace, models: dict[str, nn.Module]) -> None:
    """Save both models, and let a process of its own load and run each."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for place, model in models.items():
            target = Path(folder, place.replace(" ", "-"))
            nq.save(model, target) if place == OURS else model.save_pretrained(target)
            peak = child_peak(target, args)
            for row in rows:
                if (row.contender == BASELINE) == (place == BASELINE):
                    row.peak_bytes = peak if peak is not None else ""


def child_peak(folder: Path, args: argparse.Namespace) -> int | None:
    command = [sys.executable, "-m", "benchmarks.blocks", "--cases", args.case, "--tokens", str(args.tokens), "--mode",
               args.mode, "--threads", str(args.threads), "--peak-of", str(folder)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(machine.ROOT)})
    if done.returncode:
        print(f"  peak memory of {folder.name}: {done.stderr.strip().splitlines()[-1]}")
        return None
    return int(done.stdout.split()[-1])


@torch.no_grad()
def print_peak(case: BlockCase, folder: Path, mode: str, tokens: int) -> None:
    """Load, run once, and print how far memory rose above what the imports took.

    Every page of the model is read, of what is beside the block too: else a mapped file would count in part only."""
    import diffusers  # before the first look at memory, as is everything that loading imports

    cls = getattr(diffusers, case.cls)
    plain = "quantization_config" not in cls.load_config(folder)
    before = memory()["VmRSS"]
    model = cls.from_pretrained(folder, dtype=BF16) if plain else nq.load(folder, mode=mode)
    read_all(model)
    model.get_submodule(case.path)(**case.inputs(model, tokens or case.tokens))
    print(memory()["VmHWM"] - before)


# ------------------------------------------------------------------------------------------------------------------ CLI
def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipe", choices=CHOICES, default="quick-int4")
    parser.add_argument("--mode", choices=("auto", "a4", "a8", "a16"), default="auto")
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring each block; never below 3 rounds")
    parser.add_argument("--limit", type=float, default=60.0, help="a call slower than this is not repeated")
    parser.add_argument("--tokens", type=int, default=0, help="instead of the real number, for a dry run")
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure peak memory")
    parser.add_argument("--folder", type=Path, help="for the models of these, about 1 GB; default: the system's own")
    parser.add_argument("--quick", action="store_true", help="two blocks, few rounds, without memory")
    parser.add_argument("--out", type=Path, default=Path("blocks.csv"))
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.seconds, args.no_memory = list(QUICK), min(args.seconds, 5.0), True
    return args


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    for index, name in enumerate(args.cases, 1):
        print(f"[{index}/{len(args.cases)}] {CASES[name].label}", flush=True)
        args.case = name
        yield from measure(CASES[name], args)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(CASES[args.cases[0]], args.peak_of, args.mode, args.tokens)
        return
    RowFile.create(args.out)
    with RowFile(args.out) as file:
        for row in all_rows(args):
            file.write(row)
            print(line_of(row), flush=True)


if __name__ == "__main__":
    main()
