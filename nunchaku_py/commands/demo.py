"""`nunchaku-py demo`: the whole way on a miniature pipeline, measured."""
from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import LARGEST_SEED, whole
from .sources import quiet_libraries

SUMMARY = "quantize a miniature FLUX pipeline end to end and print what it gives"
DESCRIPTION = """\
Build a miniature FLUX pipeline with random weights, quantize it to INT4 and NVFP4 with and without calibration, save,
reload and compare, run it in every mode, and print sizes, times and errors. Nothing is downloaded, no GPU is needed.
The weights are random, so the images are noise: what counts is how little the 4-bit ones differ from the 16-bit one."""
EXAMPLES = "  nunchaku-py demo\n  nunchaku-py demo --out ./demo --seed 1\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("nunchaku_py_demo"), metavar="DIR",
                        help="folder for checkpoints, images and the table (default ./nunchaku_py_demo)")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="of the weights (default 0)")
    parser.add_argument("--tiny", action="store_true", help="a quarter of the size: seconds, and coarser numbers")


def run(args: argparse.Namespace) -> int:
    quiet_libraries(args.verbose)
    from ..demo.run import run_demo

    return 0 if run_demo(args.out, args.seed, args.tiny) else 1
