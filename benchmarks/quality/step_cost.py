"""Seconds and peak extra memory of quantizing one large linear without data, per step.

    python -m benchmarks.quality.step_cost [--format int4|nvfp4] [--out N] [--in K] [--rank R]

The peak is that of resident memory over what the process held with the layer in 16 bit, in units of that layer.
"""
from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch

from benchmarks.quality.layer_table import site_of
from nunchaku_py.methods.error import output_error
from nunchaku_py.methods.export import export
from nunchaku_py.methods.work import Context, Stats, Work
from nunchaku_py.recipes import RECIPES


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """Samples resident memory every 5 ms."""

    def __enter__(self) -> Peak:
        self.top, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.top = max(self.top, resident())

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def quantize(weight: torch.Tensor, fmt: str, rank: int) -> dict[str, float]:
    """Seconds of each step, of the error measurements and of the export."""
    ctx, seconds = Context(), {}

    def timed(name: str, call):
        start = time.perf_counter()
        result = call()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    site, stats = site_of(fmt, False, rank), Stats.white(weight.shape[1], False)
    work = timed("setup", lambda: Work.of(["layer"], [weight], site, stats))
    for step in RECIPES[f"svdquant-{fmt}"].steps_data_free:
        timed(step.__name__, lambda step=step: step(work, ctx))
        timed("errors", lambda: output_error(work, ctx))
    timed("export", lambda: export(work, ctx))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--out", type=int, default=12288)
    parser.add_argument("--in", type=int, default=3072, dest="width")
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    quantize(torch.randn(256, 256).bfloat16(), args.format, 16)  # loads what torch loads lazily
    weight = torch.empty(args.out, args.width, dtype=torch.bfloat16).normal_(std=0.02)
    before = resident()
    busy = time.process_time()
    with Peak() as peak:
        seconds = quantize(weight, args.format, args.rank)
    busy = time.process_time() - busy
    copies = (peak.top - before) / weight.nbytes
    print(f"{args.format} {args.out}x{args.width} rank {args.rank}, {torch.get_num_threads()} threads: "
          f"{sum(seconds.values()):.2f} s ({busy:.2f} s of CPU), peak extra memory {copies:.2f} copies of the layer "
          f"in 16 bit ({copies / 2:.2f} in 32 bit)")
    print("  " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
