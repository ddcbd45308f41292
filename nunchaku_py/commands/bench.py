"""`nunchaku-py bench`: speed and memory of a model in 16 bit, in 4 bit, and by other packages, side by side."""
from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ..bench.known import KNOWN
from ..errors import NunchakuError
from .arguments import whole

SUMMARY = "measure speed and memory in 16 bit and in 4 bit, side by side"
DESCRIPTION = f"""\
Measure a step, an image, loading and memory: in 16 bit, by nunchaku-py in 4 bit, and by other packages where they are
installed. MODEL is the folder of a pipeline or model, tiny-flux or tiny-sdxl, or a real architecture by name, whose
weights are then random:
  {', '.join(KNOWN)}
Every contender has a process of its own, and all take turns. Prints a table; writes it as table.csv, as a picture
(bench.png) and as a page that explains every number (index.html). Nothing is downloaded."""
EXAMPLES = ("  nunchaku-py bench flux.1-dev\n  nunchaku-py bench sdxl --width 1024 --height 1024 --modes a8,a16\n"
            "  nunchaku-py bench ./FLUX.1-dev-int4 --steps 8 --no-peers\n  nunchaku-py bench tiny-flux --quick\n")
OUT = Path("nunchaku_py_bench")
MODES = ("auto", "a4", "a8", "a16")
PROMPT = "a lighthouse on a rock at dusk, waves below, a small red boat in front of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, tiny-flux, tiny-sdxl, or one of the names above")
    add("--width", type=whole(16, 8192), metavar="PIXELS", help="of an image (default: 512 on a CPU, else the model's)")
    add("--height", type=whole(16, 8192), metavar="PIXELS")
    add("--steps", type=whole(1, 1000), metavar="N", help="denoising steps of an image (default: what is usual)")
    add("--rounds", type=whole(1, 1000), metavar="N", help="turns of everybody, after one that does not count "
        "(default: 3 on a CPU, 10 on a GPU). A turn is a step, of a pipeline an image")
    add("--modes", type=modes, default=("auto",), metavar="MODE,…", help="of ours: auto, a4, a8, a16 (default auto)")
    add("--format", choices=("int4", "nvfp4"), default="int4", help="of our random weights (default int4)")
    add("--rule", action="append", default=[], metavar="GLOB=CHOICE",
        help="linears of ours by name: w4a4, w4a16 or keep, as quantize takes it; may be repeated")
    add("--peers", action=argparse.BooleanOptionalAction, default=True,
        help="torchao, bitsandbytes, sdnq, optimum-quanto, those that are installed")
    add("--load", action=argparse.BooleanOptionalAction, default=True,
        help="measure loading, from checkpoints of random weights that need the disk for a while")
    add("--end-to-end", action="store_true", help="of a name: text encoders and decoder, too, with random weights")
    add("--prompt", default=PROMPT, help="of a pipeline")
    add("--out", type=Path, metavar="DIR", help=f"folder for what is written (default ./{OUT}/NAME)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    add("--threads", type=whole(1, 4096), metavar="N", help="of the CPU (default: PyTorch's)")
    add("--quick", action="store_true", help="one round at 128x128, without loading: shows that everything runs")


def modes(text: str) -> tuple[str, ...]:
    """An argparse type: modes with commas between."""
    found = tuple(dict.fromkeys(text.split(",")))
    wrong = [mode for mode in found if mode not in MODES]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected {', '.join(MODES)} with commas between, got {wrong[0]!r}")
    return found


def run(args: argparse.Namespace) -> int:
    from ..bench.report import write
    from ..bench.run import Options, run_bench
    from ..bench.subject import subject_of
    from .quantize import rules_of

    subject = subject_of(args.model, args.prompt, args.steps)
    options = Options(args.width, args.height, args.steps, args.rounds, args.modes, args.format,
                      rules_of(args.rule), args.peers, args.load,
                      args.end_to_end, args.device,
                      args.threads or 0, args.quick, args.verbose)
    out = args.out or OUT / subject.name
    made = _made(out)
    try:
        rows, finished = run_bench(subject, options, out, lambda what: print(what, flush=True))
    except BaseException as stop:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt("interrupted; nothing was written") from stop
        raise
    for line in write(rows, out):
        print(line)
    if not finished:
        raise KeyboardInterrupt(f"interrupted; what was measured by then is in {out}")
    return 0 if any(row.step_s != "" for row in rows) else 1


def _made(out: Path) -> bool:
    """Whether the folder was not there before."""
    there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NunchakuError(f"{out}: cannot be written: {error}") from error
    return not there


