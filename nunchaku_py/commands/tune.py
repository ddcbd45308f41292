"""`nunchaku-py tune`: measure which configurations of the Triton kernels are the fastest on this GPU."""
from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NunchakuError
from ..progress import Progress, wanted
from .arguments import whole
from .sources import model_path
from .tables import table
from .tune_requests import (
    Attention,
    Linear,
    attention_requests,
    flux_attention,
    flux_linears,
    requests,
    stored_attention,
    stored_linears,
)

if TYPE_CHECKING:  # --help imports no torch
    import torch

SUMMARY = "measure which configurations of the Triton kernels are the fastest here"
DESCRIPTION = ("Compile and time the Triton kernels on this GPU, for the quantized linears of the models named (from\n"
               "their headers; without one: FLUX.1's), and keep which configuration is the fastest for each. Later\n"
               "processes take it and find the kernels compiled. What is measured already is not measured again.")
EXAMPLES = ("  nunchaku-py tune\n  nunchaku-py tune ./FLUX.1-dev-int4 --rows 4608,512\n"
            "  nunchaku-py tune --modes a8,a4 --seconds 60\n  nunchaku-py tune --list\n")
ROWS = (4608, 4096, 2048, 1024, 512)  # tokens: 1024² with its text, without; smaller pictures; text
MODES = ("a4", "a8", "a16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", type=model_path, metavar="MODEL_OR_PIPELINE_DIR", help="default: FLUX.1's sizes")
    add("--rows", type=_listed(whole(1)), default=ROWS, metavar="M,…",
        help=f"tokens of a call, all samples together (default {','.join(map(str, ROWS))}); the most important first")
    add("--modes", type=_listed(_mode), default=(), metavar="MODE,…",
        help="a4, a8, a16 (default: what a model runs in here, unless told otherwise)")
    add("--seconds", type=whole(1), metavar="N", help="stop after so many, and keep what is measured by then")
    add("--again", action="store_true", help="measure also what is measured already")
    add("--out", type=Path, metavar="FILE", help="copy all that is measured for this GPU there, too")
    add("--device", default="cuda", metavar="NAME", help="the GPU to measure on (default cuda)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print what is measured, and measure nothing")
    only.add_argument("--clear", action="store_true", help="remove all that is measured")


def _listed(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """An argparse type: such values with commas between them."""
    def parse(text: str) -> tuple:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return parse


def _mode(text: str) -> str:
    if text not in MODES:
        raise argparse.ArgumentTypeError(f"expected {', '.join(MODES)}, got {text!r}")
    return text


def run(args: argparse.Namespace) -> int:
    if args.list:
        print(_listing())
    elif args.clear:
        print(_clear())
    else:
        _tune(args)
    return 0


# ------------------------------------------------------------------------------------------------------------ measuring
def _tune(args: argparse.Namespace) -> None:
    device = _device(args.device)
    linears = [linear for path in args.models for linear in stored_linears(path)] or flux_linears()
    attention = [one for path in args.models for one in stored_attention(path)] if args.models else flux_attention()
    from ..kernels import tuner as kernels_tuner
    from ..kernels import tuning

    tuner = kernels_tuner.Tuner(device, kernels_tuner.GraphTimer, args.seconds or math.inf)
    origin = tuning.Origin.of(tuner.gpu)
    known = tuning.read(origin)
    cases = kernels_tuner.unmeasured(_cases(linears, attention, args, device), () if args.again else known)
    print("\n".join([f"{origin}: {_count(len(cases), 'problem')} to measure, {len(known)} known", *_notes(device)]),
          flush=True)
    found = _measure(tuner, cases)
    print(_summary(tuner, found, len(cases), origin.path))
    if args.out is not None and origin.path.is_file():
        shutil.copyfile(origin.path, args.out)


def _device(name: str) -> torch.device:
    """The GPU, or why there is nothing to measure on it."""
    import torch

    from ..backends.triton.device import refuses_device

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise NunchakuError(f"--device {name}: no such device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NunchakuError("tune: this PyTorch sees no CUDA device, and configurations are measured on a GPU")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise NunchakuError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if refused := refuses_device(torch.empty(0, device=device)):
        raise NunchakuError(f"tune: Triton does not serve {device}: {refused}")
    return device


def _cases(linears: Sequence[Linear], attention: Sequence[Attention], args: argparse.Namespace, device: torch.device
           ) -> list:
    from ..kernels.tuning_cases import case_of

    wanted = [*requests(linears, args.rows, args.modes, device), *attention_requests(attention, args.rows, device)]
    return [case_of(*request) for request in wanted]


def _notes(device: torch.device) -> Iterable[str]:
    """Why what is measured may not be what runs."""
    from .. import ops
    from ..kernels import tuning
    from .op_samples import sample

    if not tuning.enabled():
        yield f"note: {tuning.ENVIRONMENT}=0 is set, which leaves unused what is measured"
    native = [f"{name} ({fmt} files)" for fmt in ("int4", "nvfp4") for name in ("linear_w4a4", "linear_w4a8")
              if ops.OPS[name].explain(*sample(ops.OPS[name], fmt, device.type))["cuda"] == "can run"]
    if native:
        yield (f"note: {', '.join(native)} run on the native kernels here; Triton's serve what those refuse, and all "
               "with NUNCHAKU_PY_BACKEND=triton")


def _measure(tuner: Any, cases: Sequence[Any]) -> list:
    found: list = []
    try:
        with Progress(len(cases), "tune") as progress:
            for outcome in tuner.run(cases):
                found.append(outcome)
                progress.say(outcome.case.label)
                progress.advance(1)
                if not wanted():
                    print(_line(outcome), flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_count(len(_measured(found)), 'problem')} of {len(cases)} measured, "
                                "which are kept; the same command goes on from there") from None
    return found


def _line(outcome: Any) -> str:
    if outcome.measured is None:
        return f"{outcome.case.label}: not measured: {outcome.why}"
    kernel, label, taken, ms, default, ms_default, faster = _row(outcome.measured)
    than = f"{default}{f' {ms_default} ms, {faster}' if faster else ''}"
    return f"{kernel}: {label}: {taken} {ms} ms (default {than})"


def _summary(tuner: Any, found: Sequence[Any], wanted: int, path: Path) -> str:
    measured = _measured(found)
    changed = sum(one.config != one.default for one in measured)
    lines = [f"measured {_count(len(measured), 'problem')}, of which {changed} run faster in another configuration "
             f"than the default; compiling took {tuner.compiled:.0f} s"]
    if len(found) < wanted:
        lines.append(f"stopped after {tuner.seconds:g} s with {wanted - len(found)} left; the same command goes on")
    refused = [f"not measured: {outcome.case.label}: {outcome.why}" for outcome in found if not outcome.measured]
    if wanted and found and not measured:
        raise NunchakuError(f"tune: nothing could be measured; {refused[0]}")
    return "\n".join([*lines, *refused, *([f"kept in {path}"] if path.is_file() else [])])


def _measured(found: Iterable[Any]) -> list:
    return [outcome.measured for outcome in found if outcome.measured]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ----------------------------------------------------------------------------------------------------- what is measured
def _listing() -> str:
    from ..kernels import tuning

    here = _path_here()
    found = [_of_file(path, path == here) for path in sorted(tuning.files(), key=lambda path: path != here)]
    return "\n\n".join(found) or f"nothing is measured yet ({tuning.folder()}); `nunchaku-py tune` measures"


def _path_here() -> Path | None:
    """The file that calls on this machine's first GPU read."""
    import torch

    from ..kernels import tuning

    if not torch.cuda.is_available():
        return None
    from ..kernels.gpu import gpu_of

    return tuning.Origin.of(gpu_of(torch.empty(0, device="cuda"))).path


def _of_file(path: Path, used: bool) -> str:
    from ..kernels import tuning

    try:
        origin, found = tuning.parsed(path)
    except NunchakuError as error:
        return str(error)
    title = f"{origin}" + (": used on this machine's GPU" if used else "")
    header = ("kernel", "problem", "configuration", "ms", "default", "ms of it", "faster")
    return f"{title}\n{path}\n{table(header, map(_row, found))}"


def _row(one: Any) -> tuple[str, ...]:
    """A line of the table. Configurations as tile m×n×k, warps, stages."""
    default, ms = ("does not run", "") if one.default_seconds is None else (
        _configuration(one.default), f"{1e3 * one.default_seconds:.4g}")
    faster = f"{one.default_seconds / one.seconds:.2f}x" if ms and one.seconds else ""
    return one.kernel, one.label, _configuration(one.config), f"{1e3 * one.seconds:.4g}", default, ms, faster


def _configuration(config: Sequence[int]) -> str:
    *tile, warps, stages = config
    return f"{'x'.join(map(str, tile))} w{warps} s{stages}"


def _clear() -> str:
    from ..kernels import tuning

    files = tuning.files()
    for path in files:
        path.unlink(missing_ok=True)
    return f"removed {_count(len(files), 'file')} from {tuning.folder()}"
