"""Output error against bytes of one layer: our recipes and sdnq, bitsandbytes, torchao, on the same weights and tokens.

    pip install torch==2.13.0 diffusers transformers peft accelerate safetensors matplotlib sdnq torchao bitsandbytes
    python benchmarks/quality/peers.py --out benchmarks/results            everything: CSV, table, plot
    python benchmarks/quality/peers.py --out benchmarks/results --plot     table and plot again, from the CSV

A peer that is not installed, or that refuses this machine, becomes a row that says so.
"""
from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs as a plain script in a source tree

from benchmarks.quality.peer_layers import PEERS, Peer, stored_bytes  # noqa: E402
from benchmarks.quality.peer_report import write_report  # noqa: E402
from benchmarks.quality.synthetic import layer, stats_of  # noqa: E402
from nunchaku_py.bench.machine import cpu_name, installed  # noqa: E402
from nunchaku_py.engine import Engine, Job  # noqa: E402
from nunchaku_py.linear import QuantLinear  # noqa: E402
from nunchaku_py.methods.work import Context  # noqa: E402
from nunchaku_py.models.plan import Unit  # noqa: E402
from nunchaku_py.recipes import recipe_of  # noqa: E402
from nunchaku_py.site import Site  # noqa: E402

RANKS = (0, 8, 16, 24, 32, 48, 64)
DEFAULT_RANK = 32
CALIBRATION, HELD_OUT = 4096, 1024  # tokens
NAME = "layer"


@dataclass(frozen=True)
class Shape:
    """One layer; `curve` seeds get every rank, the others the ranks that fit a peer's bytes."""

    name: str
    k: int
    n: int
    gelu: bool
    seeds: int
    curve: int


SHAPES = (
    Shape("3072→3072", 3072, 3072, False, seeds=5, curve=1),
    Shape("post-GELU 4608→1152 (PixArt-Σ ff.net.2)", 4608, 1152, True, seeds=2, curve=0),
    Shape("3072→12288 (FLUX ff.net.0.proj)", 3072, 12288, False, seeds=1, curve=0),
)


@dataclass
class Row:
    """One number, with what it takes to believe it."""

    method: str
    settings: str
    rank: int
    data: str  # what the quantizer saw of the inputs: "data-free" | "4096 tokens"
    mode: str  # activations: a16, a8, a4
    seed: int
    layer: str
    bits_per_weight: float | str
    bytes: int | str
    output_error: float | str
    seconds: float | str
    note: str = ""
    device: str = ""
    commit: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Ours:
    """One of our recipes in one setting."""

    recipe: str
    rank: int
    data_free: bool
    group: int | None = None  # other than the recipe's own

    @property
    def settings(self) -> str:
        plain = f"rank {self.rank}"
        return plain if self.group is None else f"{plain}, group {self.group} (no recipe ships it)"


class Bench:
    """One layer of one seed: its weight in bf16, tokens to calibrate on, other tokens to measure on."""

    def __init__(self, shape: Shape, seed: int, threads: int) -> None:
        data = layer(shape.n, shape.k, seed, shape.gelu, rows=CALIBRATION, held_out=HELD_OUT)
        self.shape, self.seed = shape, seed
        self.weight, self.tokens = data.weight.bfloat16(), data.held_out.bfloat16()
        self.stats = stats_of(data.calibration.bfloat16().float())
        self.reference = self.tokens.float() @ self.weight.float().T
        self.device = f"CPU {cpu_name()}, {threads} threads"

    def linear(self) -> nn.Linear:
        made = nn.Linear(self.shape.k, self.shape.n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        made.weight.copy_(self.weight)
        return made

    def error(self, module: nn.Module) -> float:
        """‖Y − Ŷ‖/‖Y‖, Y in fp32 from the bf16 weight, Ŷ the module's own bf16 output."""
        return ((module(self.tokens).float() - self.reference).norm() / self.reference.norm()).item()

    def row(self, method: str, settings: str, package: str, rank: int = 0, data: str = "data-free", mode: str = "a16",
            size: int | str = "", error: float | str = "", seconds: float | str = "", note: str = "") -> Row:
        bits = 8 * size / self.weight.numel() if isinstance(size, int) else ""
        return Row(method, settings, rank, data, mode, self.seed, self.shape.name, bits, size, error, seconds, note,
                   self.device, commit(), versions(package))

    def peer(self, peer: Peer) -> Row:
        try:
            start = time.perf_counter()
            module = peer.build(self.linear())
            seconds = time.perf_counter() - start
            size, error = stored_bytes(module), self.error(module)
        except Exception as refusal:  # whatever another package raises is its answer, and is written down
            return self.row(peer.method, peer.settings, peer.package, note=f"{type(refusal).__name__}: {refusal}")
        return self.row(peer.method, peer.settings, peer.package, size=size, error=error, seconds=seconds)

    def ours(self, ours: Ours) -> Iterator[Row]:
        start = time.perf_counter()
        module = self.quantized(ours)
        seconds = time.perf_counter() - start
        size = module.nbytes() - (0 if module.bias is None else module.bias.nbytes)
        several = ours.rank == DEFAULT_RANK and module.site.kind == "w4a4"
        for mode in ("a16", "a8", "a4") if several else ("a16",):
            module.set_mode(mode)
            yield self.row(ours.recipe, ours.settings, "torch", ours.rank,
                           "data-free" if ours.data_free else f"{CALIBRATION} tokens", mode, size,
                           self.error(module), seconds)

    def quantized(self, ours: Ours) -> QuantLinear:
        recipe, linear = replace(recipe_of(ours.recipe), group=ours.group), self.linear()
        unit = Unit((NAME,), recipe.kind, self.shape.gelu)
        context = Context(seed=self.seed, options=recipe.options)
        engine = Engine(recipe, context, ours.rank)
        stats = {} if ours.data_free else {unit: self.stats}
        modules, _ = engine.run(Job("", (NAME,), (unit,)), {NAME: linear}, stats)
        return modules[NAME]


def measure(bench: Bench, curve: bool) -> Iterator[Row]:
    """The peers first: their bytes say which of our ranks are wanted."""
    budgets = []
    for peer in PEERS:
        row = bench.peer(peer)
        budgets += [row.bytes] if isinstance(row.bytes, int) else []
        yield row
    for ours in settings(bench.shape, None if curve else budgets):
        yield from bench.ours(ours)


def settings(shape: Shape, budgets: list[int] | None) -> Iterator[Ours]:
    """Every rank, or those that are the largest within some budget, and the default one."""
    for data_free in (True, False):
        for fmt in ("int4", "nvfp4"):
            for rank in RANKS if budgets is None else fitting(shape, fmt, budgets):
                yield Ours(f"svdquant-{fmt}", rank, data_free)
        yield Ours("w4a16-int4", 0, data_free)
        yield Ours("w4a16-int4", 0, data_free, group=128)
        yield Ours("svdquant-int4", 4, data_free, group=256)


def fitting(shape: Shape, fmt: str, budgets: list[int]) -> list[int]:
    sizes = {rank: site_bytes(shape, fmt, rank) for rank in RANKS}
    best = {max((rank for rank in RANKS if sizes[rank] <= budget), default=None) for budget in budgets}
    return sorted((best - {None}) | {DEFAULT_RANK})


def site_bytes(shape: Shape, fmt: str, rank: int) -> int:
    """What a W4A4 site stores on disk, bias excluded."""
    site = Site("w4a4", fmt, 64 if fmt == "int4" else 16, rank)
    tensors = site.tensors(shape.n, shape.k, bias=False, dtype=torch.bfloat16)
    return sum(torch.Size(size).numel() * dtype.itemsize for size, dtype in tensors.values())


@cache
def commit() -> str:
    """The revision the run started from, with a + if the package differed from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "nunchaku_py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def versions(package: str) -> str:
    return "; ".join(f"{name} {installed(name)}" for name in dict.fromkeys(("python", "torch", package)))


def measure_all(path: Path, shapes: list[Shape], threads: int) -> None:
    """Rows are written as they come, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for shape in shapes:
            for seed in range(shape.seeds):
                for row in measure(Bench(shape, seed, threads), curve=seed < shape.curve):
                    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
                    file.flush()
                    print(f"{row.layer:12.12s} seed {seed}  {row.method:18s} {row.settings:42s} {row.data:12s} "
                          f"{row.mode:4s} {row.bits_per_weight or 0:.3f} bits  {row.output_error or row.note}",
                          flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="where CSV, table and plot go")
    parser.add_argument("--plot", action="store_true", help="measure nothing, read the CSV that is there")
    parser.add_argument("--seeds", type=int, default=None, help="at most so many seeds of every layer")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many layers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = args.out / "quality_peers.csv"
    if not args.plot:
        limit = args.seeds or max(shape.seeds for shape in SHAPES)
        shapes = [Shape(**asdict(shape) | {"seeds": min(shape.seeds, limit)}) for shape in SHAPES[:args.shapes]]
        measure_all(table, shapes, args.threads)
    write_report(table)


if __name__ == "__main__":
    main()
