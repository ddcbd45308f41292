"""What a row of results says of the machine and the software it was measured with."""
from __future__ import annotations

import datetime
import importlib.util
import os
import subprocess
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from nunchaku_py import native
from nunchaku_py.bench.machine import cpu_name
from nunchaku_py.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
ISA_VARIABLE = "NUNCHAKU_PY_CPU_ISA"
COMMIT_VARIABLE = "NUNCHAKU_PY_COMMIT"  # for a copy of the code without git
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@cache
def commit() -> str:
    """The revision measured, with a + where the code differs from it. Where git cannot say, the variable can."""
    def git(*words: str) -> str:
        return output("git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *words).strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "nunchaku_py", "csrc", "benchmarks/*.py")
    revision = git("rev-parse", "--short", "HEAD")
    return revision + ("+" if changed else "") if revision else os.environ.get(COMMIT_VARIABLE, "unknown")


def output(*command: str) -> str:
    """What a command prints; nothing where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def setup_module() -> ModuleType:
    """setup.py, for what it knows of compilers."""
    spec = importlib.util.spec_from_file_location("nunchaku_py_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def provenance() -> dict[str, str]:
    """The columns that every row begins with."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    return {"date": now, "commit": commit(), "cpu": cpu_name(), "torch": torch.__version__,
            "threads": str(torch.get_num_threads())}


def available_isas() -> list[str]:
    """The instruction sets that the native kernels can be made to use here, the best first; empty without them.

    Not those that are emulated: they are there for tests."""
    listed = getattr(native.module, "cpu_isas", None)
    if listed is None or "cpu" not in OPS["linear_w4a8"].backends:
        return []
    return [name for name, obstacle in listed() if not obstacle and "emulated" not in name]


def our_isa() -> str:
    """The instruction set that our kernels use in this process; "torch" where there are none."""
    if not available_isas():
        return "torch"
    try:
        return native.module.cpu_isa()
    except RuntimeError:  # this CPU has not the one that was asked for; every call of ours says so
        return os.environ[ISA_VARIABLE]


@cache
def torch_isa() -> str:
    """What torch's own kernels and oneDNN may use."""
    names = {"amx": torch.cpu._is_amx_tile_supported(), "vnni": torch.cpu._is_vnni_supported(),
             "bf16": torch.cpu._is_avx512_bf16_supported()}
    return "+".join([torch.backends.cpu.get_cpu_capability(), *(name for name, there in names.items() if there)])


def peaks() -> dict[str, float]:
    """Unit → GOP/s that it reaches from registers, as the native part measures it; empty where it cannot."""
    measure = getattr(native.module, "cpu_peak", None)
    return dict(measure()) if measure else {}


def evict_bytes(most: int = 2**30) -> int:
    """A buffer of this size leaves nothing else in the caches, unless they are shared and larger than `most`."""
    sizes = [int(file.read_text().strip().removesuffix("K")) * 1024 for file in CACHES.glob("index*/size")]
    return min(most, max(2**26, 2 * max(sizes, default=2**25)))


def read_bandwidth(size: int = 2**29, rounds: int = 7) -> tuple[float, str]:
    """GB/s of reading a large buffer, and how: the faster of two reductions of torch, best of some rounds."""
    buffer = torch.zeros(size // 4)
    found = {}
    for name in ("sum", "amax"):
        reduce, times = getattr(buffer, name), []
        for _ in range(rounds):
            start = time.perf_counter()
            reduce()
            times.append(time.perf_counter() - start)
        found[f"torch {name} over {size >> 20} MiB of fp32"] = size / min(times) / 1e9
    best = max(found, key=found.__getitem__)
    return found[best], best
