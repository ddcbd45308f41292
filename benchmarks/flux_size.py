"""A model of FLUX.1's size on a machine too small for it in 16 bit: made block by block, loaded, run for one step.

    python -m benchmarks.flux_size build --folder /tmp/flux-size            about 7 GB on disk
    python -m benchmarks.flux_size step --folder /tmp/flux-size --threads 2 --out flux_size.csv
    nunchaku-py convert /tmp/flux-size /tmp/svdq.safetensors --to nunchaku
    python -m benchmarks.flux_size step --folder /tmp/svdq.safetensors --steps 0 --out flux_size.csv

The architecture is that of FLUX.1-dev, the weights are random. Of each kind of block `--distinct` are drawn and
quantized, and written under the names of all the others: neither time nor memory of a step depends on what the weights
are.
"""
from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

import nunchaku_py as nq
from benchmarks import machine
from benchmarks.contenders import OURS
from benchmarks.rows import Row, RowFile, line_of
from benchmarks.step_parts import line, parts
from nunchaku_py.bench.inputs import inputs_of
from nunchaku_py.bench.known import KNOWN
from nunchaku_py.bench.machine import installed, memory
from nunchaku_py.bench.quick import CHOICES
from nunchaku_py.bench.random_models import fill, meta_model, random_tensor
from nunchaku_py.checkpoint.manifest import manifest_of
from nunchaku_py.diffusers_hook import SVDQuantConfig
from nunchaku_py.engine import Engine, Job, jobs_of
from nunchaku_py.models.plan import plan
from nunchaku_py.quantize import context_of
from nunchaku_py.recipes import Recipe
from nunchaku_py.swap import Quantized, empty_module, entry_of, replace_module

BF16 = torch.bfloat16
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a model's files
TEXT = 512
LIMIT = 9.0  # GB that the process of a step may take


# ------------------------------------------------------------------------------------------------------------- building
class Shards:
    """Writes one safetensors file per part of the model, and the index that names them, as diffusers reads them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.map, self.size = folder, count, {}, 0
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{WEIGHTS}*"):
            old.unlink()

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        name = f"{WEIGHTS}-{index + 1:05}-of-{self.count:05}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name, {"format": "pt"})
        self.map |= dict.fromkeys(tensors, name)
        self.size += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self.size}, "weight_map": self.map}
        (self.folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class Builder:
    """Makes blocks one after another: quantizes the first ones of a kind, and copies these for the rest."""

    def __init__(self, double: int, single: int, recipe: Recipe, distinct: int) -> None:
        self.model, self.distinct = meta_flux(double, single), distinct
        planned = plan(self.model, recipe.kind)
        self.groups = [unit.names for unit in planned.units if len(unit.names) > 1]
        self.engine = Engine(recipe, context_of(recipe, BF16, seed=0))
        self.jobs: dict[str, list[Job]] = {}
        for job in jobs_of(planned):
            self.jobs.setdefault(job.block, []).append(job)
        self.made: dict[str, dict[str, Tensor]] = {}  # block → its tensors, of those that are copied

    def block(self, name: str) -> dict[str, Tensor]:
        """The tensors of a block, quantized or copied."""
        kind, _, number = name.rpartition(".")
        source = f"{kind}.{int(number) % self.distinct}" if self.distinct else name
        if source != name:
            return renamed_block(self.model, source, name, self.made[source])
        tensors = quantized_block(self.model, name, self.jobs[name], self.engine)
        if self.distinct:
            self.made[name] = tensors
        return tensors


@torch.no_grad()
def build(args: argparse.Namespace) -> None:
    """Write the checkpoint. Of 16-bit weights those of one job are in memory at a time."""
    started, recipe = time.monotonic(), CHOICES[args.recipe]
    builder = Builder(args.double, args.single, recipe, args.distinct)
    count = len(builder.jobs)
    shards = Shards(args.folder, count + 1)
    for index, name in enumerate(builder.jobs):
        shards.write(index, builder.block(name))
        print(f"  [{index + 1}/{count}] {name}: {time.monotonic() - started:.0f} s so far, "
              f"peak memory {memory()['VmHWM'] / 1e9:.1f} GB", flush=True)
    shards.write(count, random_rest(builder.model, ""))
    shards.finish()
    write_config(builder.model, args.folder, recipe.name, builder.groups)
    print(f"{shards.size / 1e9:.2f} GB in {args.folder}, {time.monotonic() - started:.0f} s")


def meta_flux(double: int, single: int, **other: Any) -> FluxTransformer2DModel:
    """FLUX.1-dev without data, with so many blocks of both kinds, and other arguments where a smaller one is wanted."""
    dev = KNOWN["flux.1-dev"]
    config = {**dev.config, **other, "num_layers": double, "num_single_layers": single}
    return meta_model({"_class_name": dev.cls, **config}, dev.about)


def quantized_block(model: nn.Module, block: str, jobs: Sequence[Job], engine: Engine) -> dict[str, Tensor]:
    """Draw and quantize one block, job by job; leaves meta tensors in the model. Returns its tensors by full name."""
    tensors: dict[str, Tensor] = {}
    for job in jobs:
        fill(model, [f"{name}.{leaf}" for name in job.names for leaf in model.get_submodule(name)._parameters], "cpu")
        drawn = {name: model.get_submodule(name) for name in job.names}
        modules, _ = engine.run(job, drawn, {})
        for name, module in modules.items():
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in module.state_dict().items()}
            put_empty(model, name, module)
    return tensors | random_rest(model, f"{block}.", tensors)


def renamed_block(model: nn.Module, source: str, block: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `source` under the names of `block`, which gets the same empty modules."""
    for name, module in list(model.get_submodule(source).named_modules()):
        if getattr(module, "is_nunchaku_quantized", False) and ".parts." not in f".{name}.":
            put_empty(model, f"{block}.{name}", module)
    return {block + name.removeprefix(source): tensor for name, tensor in tensors.items()}


def put_empty(model: nn.Module, name: str, like: Quantized) -> None:
    old = model.get_submodule(name)
    replace_module(model, name, empty_module(old, entry_of(like), like.bias is not None, BF16))


def random_rest(model: nn.Module, prefix: str, known: Container[str] = ()) -> dict[str, Tensor]:
    """Random values for what is not quantized: in the block `prefix`, or ("") outside all blocks."""
    found = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)
             and name not in known and (prefix or "transformer_blocks." not in name)}
    return {name: random_tensor(name, tensor.shape) for name, tensor in found.items()}


def write_config(model: FluxTransformer2DModel, folder: Path, recipe: str, groups: Sequence[Sequence[str]]) -> None:
    """config.json with the description of what is quantized."""
    config = SVDQuantConfig()
    config.describe(manifest_of(model, recipe, groups), BF16)
    model.register_to_config(quantization_config=config)
    model.save_config(folder)


# ------------------------------------------------------------------------------------------------------------- one step
def step(args: argparse.Namespace) -> None:
    """Load and run the checkpoint in this process, which has done nothing else."""
    torch.set_num_threads(args.threads)
    before, started = memory(), time.monotonic()
    model = nq.load(args.folder, mode=args.mode, mmap=args.mmap or args.ram is not None)
    nq.offload(model, ram=args.ram)
    loaded, seconds = memory(), time.monotonic() - started
    print(f"loaded in {seconds:.1f} s: {gigabytes(loaded)} (imports alone: {gigabytes(before)})", flush=True)
    print(nq.explain(model), flush=True)
    times = list(steps(model, args))
    after = memory()
    row = Row(**machine.provenance(), isa=machine.our_isa(), op="step" if times else "load",
              contender=f"{OURS} {args.mode}{' mapped' if args.mmap or args.ram else ''}", note=(
        f"load {seconds:.1f} s; after it {gigabytes(loaded)}; the imports alone {gigabytes(before)}"),
        shape=f"FLUX.1 transformer, {len(model.transformer_blocks)} + {len(model.single_transformer_blocks)} blocks",
        m=args.tokens + TEXT if times else "", peak_bytes=after["VmHWM"], version=installed("diffusers"),
        stored_bytes=sum(file.stat().st_size for file in weight_files(args.folder)))
    row.fill_times(times or [seconds], None)
    if args.out:
        with RowFile(args.out) as file:
            file.write(row)
    print(line_of(row))
    verdict = "within" if after["VmHWM"] <= LIMIT * 1e9 else "ABOVE"
    print(f"peak memory {after['VmHWM'] / 1e9:.2f} GB, {verdict} {LIMIT:g} GB; at the end {gigabytes(after)}")


@torch.no_grad()
def steps(model: FluxTransformer2DModel, args: argparse.Namespace) -> Iterator[float]:
    inputs = inputs_of(model, *sides(args.tokens), TEXT, batch=1)
    for number in range(args.steps):
        started, given = time.monotonic(), []
        if args.parts:
            print(line(parts(lambda given=given: given.append(model(**inputs)))))
        else:
            given.append(model(**inputs))
        yield time.monotonic() - started
        y = given[0].sample
        print(f"step {number + 1}: {time.monotonic() - started:.1f} s, output {tuple(y.shape)}, "
              f"{'finite' if y.isfinite().all() else 'NOT FINITE'}, {gigabytes(memory())}", flush=True)


def sides(tokens: int) -> tuple[int, int]:
    """Pixels of an image, as square as can be, that has so many tokens of 16×16."""
    columns = next(count for count in range(math.isqrt(tokens), 0, -1) if tokens % count == 0)
    return 16 * columns, 16 * (tokens // columns)


def weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def gigabytes(memory: dict[str, int]) -> str:
    return (f"{memory['VmRSS'] / 1e9:.2f} GB resident: {memory['RssAnon'] / 1e9:.2f} its own, "
            f"{memory['RssFile'] / 1e9:.2f} of mapped files")


# ------------------------------------------------------------------------------------------------------------------ CLI
def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "step"))
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint, or a file; delete it afterwards")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--double", type=int, default=19, help="build: double blocks")
    parser.add_argument("--single", type=int, default=38, help="build: single blocks")
    parser.add_argument("--recipe", choices=CHOICES, default="quick-int4", help="build")
    parser.add_argument("--distinct", type=int, default=1, help="build: different blocks of each kind, 0: all")
    parser.add_argument("--quick", action="store_true", help="build: 1 double and 2 single blocks; step: 64 tokens")
    parser.add_argument("--mode", choices=("auto", "a4", "a8", "a16"), default="auto", help="step")
    parser.add_argument("--tokens", type=int, default=1024, help="step: of the image; 1024 are 512×512")
    parser.add_argument("--steps", type=int, default=2, help="step: how many, 0: load only")
    parser.add_argument("--parts", action="store_true", help="step: where its time goes; takes memory of its own")
    parser.add_argument("--mmap", action="store_true", help="step: map the weights by nq.load(..., mmap=True)")
    parser.add_argument("--ram", help="step: map them, and let so much of them be in the process's memory, as '4GB'")
    parser.add_argument("--out", type=Path, help="step: CSV that the row is added to")
    args = parser.parse_args(argv)
    if args.quick:
        args.double, args.single, args.tokens = 1, 2, 64
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    build(args) if args.command == "build" else step(args)


if __name__ == "__main__":
    main()
