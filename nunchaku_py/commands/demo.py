"""`nunchaku-py demo`: the whole way on a trained miniature, measured and shown."""
from __future__ import annotations

import argparse
from pathlib import Path

from ..demo import shipped
from .arguments import LARGEST_SEED, whole
from .sources import quiet_libraries, require_pillow

SUMMARY = "quantize a small trained pipeline end to end, and show what it paints"
DESCRIPTION = """\
Load a small trained pipeline that comes with the package, quantize it to INT4 and NVFP4, save, reload and compare bit
for bit, and paint the same prompts in 16 bit and in every mode. Prints how near the pictures are, whether they show
what was asked for, times and sizes; writes a contact sheet (sheet.png), a page (index.html), the numbers (table.csv)
and the quantized pipelines. Nothing is downloaded, no GPU is needed."""
EXAMPLES = "  nunchaku-py demo\n  nunchaku-py demo --model tiny-sdxl --out ./demo --seed 1\n"
OUT = Path("nunchaku_py_demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(shipped.CALLS), default="tiny-flux",
                        help="which pipeline (default tiny-flux)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help=f"folder for everything that is written (default ./{OUT}/MODEL)")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED - 10**6), default=0,
                        help="of the prompts and the noise (default 0)")
    parser.add_argument("--quick", action="store_true", help="two prompts, two steps: seconds, and rough pictures")


def run(args: argparse.Namespace) -> int:
    require_pillow()
    quiet_libraries(args.verbose)
    from ..demo.run import FULL, QUICK, run_demo

    out = args.out or OUT / args.model
    return 0 if run_demo(args.model, out, args.seed, QUICK if args.quick else FULL) else 1
