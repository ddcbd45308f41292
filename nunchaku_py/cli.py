"""The command line, `nunchaku-py`: parses, runs a command, and turns what goes wrong into one sentence and a code.

Exit codes: 0 done, 1 the user can mend it (a sentence on stderr), 2 wrong usage, 130 interrupted.
"""
from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from . import __version__
from .commands import bench, convert, demo, generate, info, inspect, quantize, tune
from .errors import NunchakuError

COMMANDS = (info, quantize, convert, inspect, generate, bench, demo, tune)
LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "accelerate", "torch")
MENDABLE = (NunchakuError, OSError)  # OSError: a disk that is full, a folder that may not be read

EXAMPLES = """\
examples:
  nunchaku-py info
  nunchaku-py quantize ./FLUX.1-dev ./FLUX.1-dev-int4
  nunchaku-py convert ./svdq-int4_r32-flux.1-dev.safetensors ./FLUX.1-dev-int4 --into ./FLUX.1-dev
  nunchaku-py inspect ./FLUX.1-dev-int4
  nunchaku-py generate ./FLUX.1-dev-int4 --prompt "a lighthouse at dusk" --out lighthouse.png
  nunchaku-py bench flux.1-dev
  nunchaku-py demo
  nunchaku-py tune ./FLUX.1-dev-int4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse itself exits with 2 on wrong usage)."""
    args = parser().parse_args(argv)
    _set_up_messages(args.verbose)
    try:
        return args.run(args)
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "interrupted", 130)
    except BrokenPipeError:  # `nunchaku-py inspect … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MENDABLE as error:
        if args.debug:
            raise
        return _say(str(error), 1)
    except Exception as error:
        if args.debug:
            raise
        first = next(iter(str(error).splitlines()), "")
        if _is_out_of_memory(error):
            return _say(f"out of memory ({first}); use a smaller size, or --device cpu", 1)
        return _say(f"unexpected {type(error).__name__}: {first} (a mistake of ours; --debug shows where)", 1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nunchaku-py", parents=[_common(False)], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="4-bit diffusion models (SVDQuant) with their LoRAs, as a drop-in for diffusers.")
    top.add_argument("--version", action="version", version=f"nunchaku-py {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        made = subparsers.add_parser(
            name, parents=[_common(argparse.SUPPRESS)], help=command.SUMMARY, description=f"{command.DESCRIPTION}",
            epilog=f"examples:\n{command.EXAMPLES}", formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(made)
        made.set_defaults(run=command.run)
    return top


def _common(default: object) -> argparse.ArgumentParser:
    """Options that stand before or behind the command; one that does not stand behind must not undo one before."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", default=default,
                        help="log what is done, and let diffusers and transformers speak")
    common.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    return common


def _set_up_messages(verbose: bool) -> None:
    """Our own log at INFO with -v. The libraries' notices are about their business, not the user's: silent without."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("nunchaku_py")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        return
    warnings.simplefilter("ignore")
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # read when the library is imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)


def _is_out_of_memory(error: Exception) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    return "OutOfMemoryError" in names or isinstance(error, MemoryError)


def _say(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"nunchaku-py: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
