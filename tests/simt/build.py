"""Compiles kernels as C++ of the host and calls them with tensors: call.h is the other side, simt.h the machine.

    library = load("instructions")                       # tests/simt/instructions.cpp, compiled if anything changed
    library.run("shuffles", values, lanes, out)          # raises Fault with a sentence; returns what was counted
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# No contraction: nvcc is told the same, and kernels write fmaf where they mean it. Hidden symbols keep the options and
# buffers of one library apart from another's.
OPTIONS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread", "-shared", "-fPIC",
           "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", f"-I{HERE}")


class Fault(Exception):
    """What a kernel did wrong, in a sentence that begins with the kind of fault."""


# ---- compiling -------------------------------------------------------------------------------------------------------


@functools.cache
def compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "c++")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def refuses() -> str | None:
    if os.name != "posix":
        return f"kernels run on the host where there are POSIX memory maps, not on {platform.system()}"
    return None if compiler() else "no C++ compiler (CXX, g++, c++) to run kernels on the host with"


def cached(command: Sequence[str], name: str, suffix: str) -> Path:
    """What `command … -o file` makes, in build/simt: made again only when something that it reads changes."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([*command, version]).encode())
    for source in sources(command):
        key.update(source.read_bytes())
    output = ROOT / "build/simt" / f"{name}-{key.hexdigest()[:16]}{suffix}"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f"partial-{os.getpid()}-{output.name}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        assert done.returncode == 0, f"`{' '.join(command)}` failed:\n{done.stderr[:4000]}"
        partial.replace(output)
    return output


def sources(command: Sequence[str]) -> list[Path]:
    """What this compiler's command reads, but for headers of the system."""
    rule = subprocess.run([*command, "-MM"], capture_output=True, text=True)
    assert rule.returncode == 0, f"`{' '.join(command)} -MM` failed:\n{rule.stderr[:4000]}"
    return [Path(name) for name in shlex.split(rule.stdout.replace("\\\n", " ").partition(":")[2])]


# ---- calling ---------------------------------------------------------------------------------------------------------


class Call(ctypes.Structure):
    """How to run, and what was counted: simt::Call, where the options are explained."""

    _fields_ = [*((name, ctypes.c_int32) for name in ("race", "trap", "reverse", "truncate", "workers",
                                                         "eager")),
                *((name, ctypes.c_int64) for name in ("ldmatrix_phases", "ldmatrix_matrices", "switches"))]


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


def as_argument(value: Tensor | float | int | str) -> ctypes.Structure | ctypes._SimpleCData:
    """As the exported functions declare it: Array, float, int, const char*."""
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.device.type == "cpu"
        return Array(value.data_ptr(), value.numel() * value.element_size())
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


class Library:
    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))

    def run(self, name: str, *arguments: Tensor | float | int | str, race: bool = True, trap: bool = True,
            reverse: bool = False, truncate: bool = False, workers: int = 1, eager: bool = False) -> Call:
        """Calls an exported function. Tensors that it takes as outputs are written in place."""
        function = getattr(self._functions, name)
        function.restype = ctypes.c_char_p
        call = Call(race, trap, reverse, truncate, workers, eager)
        sentence = function(ctypes.byref(call), *map(as_argument, arguments))
        if sentence:
            raise Fault(sentence.decode())
        return call


@functools.cache
def load(name: str, *options: str) -> Library:
    return Library(cached([compiler(), *OPTIONS, *options, str(HERE / f"{name}.cpp")], name, ".so"))
