"""`nunchaku-py quantize` on a folder of FLUX.1-dev's size: how long, and how much memory.

    python -m benchmarks.flux_folder /tmp/flux-16bit
    python -m benchmarks.flux_quantize /tmp/flux-16bit /tmp/flux-int4 --out quantize.csv
    python -m benchmarks.flux_quantize --temporary --device cuda    (makes the folder, and deletes it afterwards)
    python -m benchmarks.flux_quantize /tmp/flux-16bit /tmp/again --killed 3        (--like /tmp/flux-int4)

--killed: ends the command so many times by SIGKILL, at random moments, and starts it again; --like: compares its files
with those of a run that nothing disturbed.
"""
from __future__ import annotations

import argparse
import filecmp
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.flux_folder import SIZE, build
from benchmarks.gpu import GpuRow, provenance
from benchmarks.rows import RowFile

LIMITS = {"cpu": (45 * 60, 6.0), "cuda": (4 * 60, 8.0)}  # seconds and GB of a folder of FLUX.1-dev's size, data-free


@dataclass
class QuantizeRow(GpuRow):
    """peak: GB of the process, or of the GPU that computed."""

    threads: str
    recipe: str
    gigabytes: float
    seconds: float
    peak: float
    limit_seconds: float
    limit_peak: float
    within: str
    note: str


def command(args: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "nunchaku_py", "quantize", str(args.folder), str(args.model), "--device", args.device,
            "--recipe", args.recipe, *args.more]


def run(args: argparse.Namespace) -> QuantizeRow:
    """The command in a process of its own."""
    started = time.monotonic()
    said = subprocess.run(command(args), check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.monotonic() - started
    print("\n".join(said.splitlines()[-8:]), flush=True)
    peaks = [float(number) for number in re.findall(r"([\d.]+) GB", said.splitlines()[-1])]
    limit_seconds, limit_peak = LIMITS["cuda" if args.device.startswith("cuda") else "cpu"]
    peak = peaks[-1]
    within = "yes" if seconds <= limit_seconds and peak <= limit_peak else "NO"
    size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors")) / 1e9
    return QuantizeRow(**provenance(args.device), threads=str(torch.get_num_threads()), recipe=args.recipe,
                       gigabytes=size, seconds=seconds, peak=peak, limit_seconds=limit_seconds, limit_peak=limit_peak,
                       within=within, note=args.note)


def killed(args: argparse.Namespace) -> None:
    """Ends it at random moments, and lets it finish at last."""
    moments = random.Random(args.seed)
    for number in range(args.killed):
        process = subprocess.Popen(command(args), stdout=subprocess.DEVNULL)
        wait = moments.uniform(*args.between)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        blocks = len(list(args.model.with_name(f"{args.model.name}.partial").rglob("*.safetensors")))
        print(f"killed {number + 1} of {args.killed} times, after {wait:.1f} s, {blocks} blocks finished", flush=True)
        if args.model.exists():
            return


def compare(model: Path, like: Path) -> None:
    names = sorted(file.name for file in like.iterdir() if file.suffix in (".safetensors", ".json"))
    names = [name for name in names if not name.startswith("report")]  # it tells how long it took
    different = [name for name in names if not filecmp.cmp(model / name, like / name, shallow=False)]
    if different:
        raise SystemExit(f"different: {', '.join(different)}")
    print(f"identical to {like}: {', '.join(names)}")


def measure(args: argparse.Namespace) -> None:
    killed(args)
    row = run(args)
    print(row.line())
    if args.out and not args.killed:
        with RowFile(args.out, QuantizeRow) as file:
            file.write(row)
    if args.like:
        compare(args.model, args.like)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="of the 16-bit model")
    add("model", type=Path, nargs="?", help="what becomes of it")
    add("--temporary", action="store_true", help="in a folder of its own that is deleted, 31 GB while it lasts")
    add("--device", default="cpu")
    add("--recipe", default="svdquant-int4")
    add("--killed", type=int, default=0, metavar="N")
    add("--between", type=float, nargs=2, default=(20, 120), metavar=("LOW", "HIGH"), help="seconds before a kill")
    add("--like", type=Path, help="a folder that an undisturbed run made")
    add("--seed", type=int, default=0, help="of the moments")
    add("--out", type=Path, help="CSV that the row is added to")
    add("--note", default="", help="for the row")
    add("--more", nargs=argparse.REMAINDER, default=[], help="options of the command, at the end")
    args = parser.parse_args()
    if args.temporary == (args.model is not None):
        parser.error("expected FOLDER and MODEL, or --temporary")
    with tempfile.TemporaryDirectory() if args.temporary else nullcontext() as own:
        if own is not None:
            args.folder, args.model = Path(own) / "flux", Path(own) / "int4"
            build(args.folder, *SIZE)
        measure(args)


if __name__ == "__main__":
    main()
