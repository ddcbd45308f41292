"""What a 4-bit model holds on its device with modulation tables and without: counted, of models without data.

    python -m benchmarks.tables                      FLUX.1, Qwen-Image, SD3.5 Large
    python -m benchmarks.tables --steps 50 --prompts 2
    python -m benchmarks.tables rows --threads 2     why rows of a schedule are computed one call each
    python -m benchmarks.tables memory --folder DIR  of a process, for a checkpoint that benchmarks.flux_size has built

A model's linears become those that its recipe makes; stored bytes are those of its tensors. What the CUDA kernels of a
mode derive from them is counted too: scales in their layout (a4), biases and reciprocals in fp32.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

import nunchaku_py as nq
from benchmarks.flux_size import TEXT, gigabytes, sides
from benchmarks.shapes import CONFIGS
from nunchaku_py.bench import machine
from nunchaku_py.bench.inputs import inputs_of
from nunchaku_py.engine import Engine, jobs_of
from nunchaku_py.linear import QuantLinear
from nunchaku_py.models.plan import plan
from nunchaku_py.quantize import context_of
from nunchaku_py.recipes import RECIPES
from nunchaku_py.site import Site
from nunchaku_py.swap import empty_module, quantized_sites, replace_module
from nunchaku_py.tables import modulation_linears

GIB = 2**30
MODELS = ("flux", "qwen", "sd35")


@dataclass(frozen=True)
class Sizes:
    """Bytes on the device. table: of all steps, for so many prompts."""

    codes: int
    scales: int
    branch: int
    smooth_and_bias: int
    modulation: int
    sixteen_bit: int
    derived: int  # by the CUDA kernels of mode a4
    table: int

    @property
    def stored(self) -> int:
        """All weights as the file has them."""
        return (self.codes + self.scales + self.branch + self.smooth_and_bias + self.modulation + self.sixteen_bit)

    @property
    def resident(self) -> int:
        """With the table in the place of the modulation weights."""
        return self.stored - self.modulation + self.table


def quantized(name: str, recipe: str = "svdquant-int4") -> nn.Module:
    """The model as the recipe makes it, on the meta device."""
    cls, config = CONFIGS[name]
    with init_empty_weights():
        model = getattr(diffusers, cls)(**config).bfloat16()
    planned = plan(model, RECIPES[recipe].kind)
    engine = Engine(RECIPES[recipe], context_of(RECIPES[recipe], torch.bfloat16, seed=0))
    for job in jobs_of(planned):
        for linear in job.names:
            old = model.get_submodule(linear)
            parts = [(unit.k_range, engine.site_of(unit, *_shape(old, unit.k_range)))
                     for unit in job.units if linear in unit.names]
            entry = parts[0][1] if parts[0][0] is None else tuple(parts)
            replace_module(model, linear, empty_module(old, entry, old.bias is not None, torch.bfloat16))
    return model


def _shape(linear: nn.Module, k_range: tuple[int, int] | None) -> tuple[int, int]:
    return linear.out_features, linear.in_features if k_range is None else k_range[1] - k_range[0]


def sizes(model: nn.Module, steps: int, prompts: int) -> Sizes:
    modulation = list(modulation_linears(model).values())
    others = [site for site in quantized_sites(model) if site not in set(modulation)]
    known = {id(tensor) for site in (*modulation, *others) for tensor in site.parameters()}
    outputs = sum(site.rows_out for site in modulation)

    def of(*names: str) -> int:
        return sum(_nbytes(site._parameters.get(name)) for site in others for name in names)

    return Sizes(
        of("codes"), of("scales", "channel_scale", "zeros"), of("down", "up"), of("smooth", "bias"),
        sum(site.nbytes() for site in modulation), sum(tensor.nbytes for tensor in model.parameters()
                                                       if id(tensor) not in known),
        of("scales") + 4 * sum(site.rows_in + site.rows_out for site in others), outputs * 2 * steps * prompts)


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


def table(name: str, found: Sizes) -> str:
    """Lines of what is on the device."""
    rows = {"4-bit codes": found.codes, "scales": found.scales, "branch of rank 32": found.branch,
            "smoothing and biases": found.smooth_and_bias, "in 16 bit": found.sixteen_bit,
            "modulation weights": found.modulation, "= stored": found.stored,
            "modulation tables": found.table, "= with tables instead of weights": found.resident,
            "derived by CUDA kernels in a4": found.derived, "= with these": found.resident + found.derived}
    return "\n".join([f"{name}:", *(f"  {bytes_ / GIB:7.3f} GiB {bytes_ / 1e6:9.1f} MB  {what}"
                                    for what, bytes_ in rows.items())])


@torch.no_grad()
def rows(steps: int = 28, k: int = 3072, n: int = 18432) -> str:
    """One call for all steps against a call for each: seconds, and how many outputs differ in bf16."""
    torch.manual_seed(0)
    site = QuantLinear(Site("w4a16", "int4", 64), k, n, True, torch.bfloat16)
    site.set_tensor("codes", torch.randint(0, 256, (n, k // 2), dtype=torch.uint8))
    site.set_tensor("scales", (0.01 * torch.rand(n, k // 64) + 1e-3).bfloat16())
    site.set_tensor("bias", torch.randn(n).bfloat16())
    x, lines = torch.randn(steps, k).bfloat16(), []
    for backend in ("cpu", "torch"):
        with nq.backend(backend):
            alone, seconds = _timed(lambda: torch.cat([site(row) for row in x.split(1)]))
            together, less = _timed(lambda: site(x))
        off = (alone.view(torch.int16).int() - together.view(torch.int16).int()).abs()
        lines.append(f"{k} -> {n}, {steps} rows on {backend}: {1e3 * seconds:.0f} ms by calls of one row, "
                     f"{1e3 * less:.0f} ms by one of all; of these {100 * (off > 0).float().mean():.3f} % differ, "
                     f"by up to {int(off.max())} ulp")
    return "\n".join(lines)


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    run()
    started = time.perf_counter()
    return run(), time.perf_counter() - started


@dataclass
class Pipeline:
    """What nq.cache_modulation wants of one."""

    scheduler: diffusers.FlowMatchEulerDiscreteScheduler
    components: dict[str, nn.Module]


@torch.no_grad()
def memory(folder: Path, steps: int, tokens: int, run: int = 3) -> Iterator[str]:
    """The process after `run` steps of a schedule without tables, then with them; whether the outputs are the same."""
    model = nq.load(folder)
    pipe = Pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), {"transformer": model})
    pipe.scheduler.set_timesteps(steps)
    inputs, found = inputs_of(model, *sides(tokens), TEXT, batch=1), []
    for enabled in (False, True):
        nq.cache_modulation(pipe, enabled)
        for step in pipe.scheduler.timesteps[:run]:
            started = time.perf_counter()
            found.append(model(**inputs | {"timestep": step.expand(1).bfloat16() / 1000}).sample)
            yield (f"step at {float(step):.0f} {'with' if enabled else 'without'} tables: "
                   f"{time.perf_counter() - started:.2f} s, {gigabytes(machine.memory())}")
    same = all(torch.equal(*pair) for pair in zip(found[:run], found[run:], strict=True))
    yield f"the outputs are {'the same bits' if same else 'DIFFERENT'}; {nq.explain(model).tables[0]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=(*MODELS, "all", "rows", "memory"), default="all")
    parser.add_argument("--folder", type=Path, help="memory: of the checkpoint")
    parser.add_argument("--tokens", type=int, default=64, help="memory: of the image")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--prompts", type=int, default=1, help="2 with true guidance, times images in a batch")
    parser.add_argument("--recipe", choices=("svdquant-int4", "svdquant-nvfp4"), default="svdquant-int4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.what in ("rows", "memory"):
        for line in [rows(args.steps)] if args.what == "rows" else memory(args.folder, args.steps, args.tokens):
            print(line, flush=True)
        return
    for name in MODELS if args.what == "all" else (args.what,):
        print(table(f"{CONFIGS[name][0]}, {args.recipe}, {args.steps} steps, {args.prompts} prompt(s)",
                    sizes(quantized(name, args.recipe), args.steps, args.prompts)))


if __name__ == "__main__":
    main()
