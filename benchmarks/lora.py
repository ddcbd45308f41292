"""LoRAs on a model of FLUX.1's size on a CPU: loading, changing a strength, taking off; and what they cost at run time.

    python -m benchmarks.flux_size build --folder /tmp/flux-size            about 7 GB on disk
    python -m benchmarks.lora size --folder /tmp/flux-size
    python -m benchmarks.lora speed

size: a random adapter of `--rank` on every quantized linear of the 19 + 38 blocks. Beside it the same calls on the
16-bit model, whose weights are on the meta device: only PEFT's bookkeeping, which ours has as well. "set_adapters"
includes the writing of the new strengths into the branches: nothing is left for the next call.
speed: one linear, and three that share an input, with ranks beside the base's 32, each round against none.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.flux_size import meta_flux
from benchmarks.machine import provenance
from benchmarks.rows import Origin, RowFile
from benchmarks.sites import Setting, quantized
from benchmarks.timing import Spread, interleave
from nunchaku_py.checkpoint.own import load
from nunchaku_py.linear import QuantLinear
from nunchaku_py.lora.branch import Adapter, InputGroup, fold
from nunchaku_py.swap import quantized_modules

BF16 = torch.bfloat16
REPEATS = 9
RANKS = (16, 64, 128)
ROWS = (256, 1024, 4096)
WIDTHS = ((3072, 3072), (12288, 3072), (3072, 12288))  # (N, K)
LIMIT = 30.0


@dataclass
class Row(Origin):
    what: str
    where: str
    rank: int
    median_ms: float
    low_ms: float
    high_ms: float
    over: float | str = ""  # times as long as without adapters, round by round
    over_low: float | str = ""
    over_high: float | str = ""


def row(what: str, where: str, rank: int, seconds: Sequence[float], over: Spread | None = None,
        device: str = "cpu") -> Row:
    machine = provenance() if device == "cpu" else provenance() | {"cpu": torch.cuda.get_device_name()}
    took = Spread.of([1e3 * value for value in seconds])
    ratio = (over.median, over.low, over.high) if over else ("", "", "")
    return Row(**machine, what=what, where=where, rank=rank, median_ms=took.median, low_ms=took.low,
               high_ms=took.high, over=ratio[0], over_low=ratio[1], over_high=ratio[2])


# ----------------------------------------------------------------------------------------------------- FLUX.1's size
def adapter(model: nn.Module, names: Sequence[str], rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        n, k = model.get_submodule(name).weight.shape
        found[f"{name}.lora_A.weight"] = torch.randn(rank, k, dtype=BF16) * 0.02
        found[f"{name}.lora_B.weight"] = torch.randn(n, rank, dtype=BF16) * 0.02
    return found


def size(args: argparse.Namespace) -> Iterator[Row]:
    model, plain = load(args.folder), meta_flux(19, 38)
    names = list(quantized_modules(model))
    state = adapter(model, names, args.rank)
    print(f"{len(names)} linears, {sum(t.nbytes for t in state.values()) / 1e6:.0f} MB of adapter", flush=True)
    first = model.transformer_blocks[0].attn.to_q
    x = torch.randn(64, first.in_features, dtype=BF16)
    with torch.no_grad():
        before = first(x)
    yield timed("load_lora_adapter", "quantized", args.rank,
                lambda: model.load_lora_adapter(state, prefix=None, adapter_name="style", low_cpu_mem_usage=True), 1)
    plain.load_lora_adapter(dict(state), prefix=None, adapter_name="style", low_cpu_mem_usage=True)
    yield from strengths(model, plain, args.rank, ["style"])
    model.load_lora_adapter({key: tensor.flip(0) for key, tensor in state.items()}, prefix=None, adapter_name="other")
    plain.load_lora_adapter(dict(state), prefix=None, adapter_name="other", low_cpu_mem_usage=True)
    yield timed("set_adapters to two instead of one", "quantized", args.rank,
                lambda: model.set_adapters(["style", "other"], [0.5, 0.5]), 1)
    plain.set_adapters(["style", "other"], [0.5, 0.5])
    yield from strengths(model, plain, args.rank, ["style", "other"])
    yield timed("disable_lora", "quantized", args.rank, model.disable_lora, 1)
    yield timed("enable_lora", "quantized", args.rank, model.enable_lora, 1)
    yield timed("unload_lora", "quantized", args.rank, model.unload_lora, 1)
    with torch.no_grad():
        print("the same bits after unloading:", torch.equal(first(x), before))


def strengths(model: nn.Module, plain: nn.Module, rank: int, names: list[str]) -> Iterator[Row]:
    """set_adapters with other weights, in turns with the same on the 16-bit model."""
    took: dict[str, list[float]] = {"quantized": [], "16 bit, on meta": []}
    for i in range(REPEATS):
        for where, one in zip(took, (model, plain), strict=True):
            weights = [0.3 + 0.05 * i + 0.1 * j for j in range(len(names))]
            took[where].append(seconds_of(lambda one=one, weights=weights: one.set_adapters(names, weights)))
    for where, seconds in took.items():
        yield row(f"set_adapters, {len(names)} adapters", where, rank, seconds)
    yield row(f"set_adapters, {len(names)} adapters: above PEFT's own", "difference", rank,
              [ours - theirs for ours, theirs in zip(*took.values(), strict=True)])


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(what: str, where: str, rank: int, call: Callable[[], object], times: int) -> Row:
    return row(what, where, rank, [seconds_of(call) for _ in range(times)])


# ------------------------------------------------------------------------------------------------------ run-time cost
def speed(args: argparse.Namespace) -> Iterator[Row]:
    device = torch.device(args.device)
    for n, k in WIDTHS[:1] if args.quick else WIDTHS:
        yield from compared(f"linear {n}x{k}", lambda r, n=n, k=k: [linear(n, k, r, device)], args)
    yield from compared("q, k, v 3072x3072", lambda r: together(
        [linear(3072, 3072, r, device) for _ in range(3)]), args)


def linear(n: int, k: int, rank: int, device: torch.device) -> QuantLinear:
    torch.manual_seed(n + k)
    site = quantized(nn.Linear(k, n, dtype=BF16), Setting()).to(device)
    site.set_mode("auto")
    if rank:
        down, up = (nn.Linear(*size, bias=False, dtype=BF16, device=device) for size in ((k, rank), (rank, n)))
        site.adapters = (Adapter(down, up, 1.0),)
        fold(site)
    return site


def together(sites: list[QuantLinear]) -> list[QuantLinear]:
    """As if quantized together: one smooth, one down."""
    for site in sites[1:]:
        site.set_tensor("smooth", sites[0].smooth.data)
        site.set_tensor("down", sites[0].down.data)
    InputGroup.of(sites)
    fold(sites[0])
    return sites


def compared(what: str, make: Callable[[int], list[QuantLinear]], args: argparse.Namespace) -> Iterator[Row]:
    made = {rank: make(rank) for rank in (0, *RANKS)}
    for m in ROWS[:1] if args.quick else ROWS:
        x = torch.randn(m, made[0][0].in_features, dtype=BF16).to(args.device)
        calls = {str(rank): lambda sites=sites, x=x: run(sites, x) for rank, sites in made.items()}
        found = interleave(calls, args.seconds, LIMIT)
        for rank in made:
            baseline = found.speedup("0", str(rank))  # times as fast as without: how much longer it takes
            yield row(what, f"{m} rows", rank, found.rounds[str(rank)], baseline, args.device)


@torch.no_grad()
def run(sites: Sequence[QuantLinear], x: Tensor) -> None:
    quantized_input = sites[0].quantize_input(x)
    for site in sites:
        site.multiply(quantized_input, x.dtype)
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("size", "speed"))
    options.add_argument("--folder", type=Path, default=Path("/tmp/flux-size"))
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", default="cpu", help="speed: cpu or cuda")
    options.add_argument("--seconds", type=float, default=20.0, help="speed: for each comparison")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/lora_cpu.csv"))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with RowFile(args.out, Row) as file:
        for one in (size if args.what == "size" else speed)(args):
            file.write(one)
            over = f", {one.over:.3f} times as long as without" if one.over else ""
            print(f"{one.what}, {one.where}, rank {one.rank}: {one.median_ms:.1f} ms "
                  f"({one.low_ms:.1f}-{one.high_ms:.1f}){over}", flush=True)


if __name__ == "__main__":
    main()
