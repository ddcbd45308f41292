"""What a row of results says of the machine and the software it was measured with."""
from __future__ import annotations

import datetime
import os
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

from benchmarks.quality.peers import cpu_name, installed
from nunchaku_py import native

ROOT = Path(__file__).resolve().parents[1]
ISA_VARIABLE = "NUNCHAKU_PY_CPU_ISA"
ISA_NEEDS = {"amx": "amx_int8", "avx512": "avx512_vnni", "avx2": "avx2"}  # → the feature without which it cannot run
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

__all__ = ["ISA_VARIABLE", "ROOT", "available_isas", "commit", "cpu_name", "evict_bytes", "installed", "our_isa",
           "peaks", "provenance", "read_bandwidth", "torch_isa"]


@cache
def commit() -> str:
    """The revision measured, with a + where the code differs from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "nunchaku_py", "csrc", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def provenance() -> dict[str, str]:
    """The columns that every row begins with."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    return {"date": now, "commit": commit(), "cpu": cpu_name(), "torch": torch.__version__,
            "threads": str(torch.get_num_threads())}


def available_isas() -> list[str]:
    """The instruction sets that the native kernels can be made to use here, the best first; empty without them."""
    from nunchaku_py.ops import OPS

    if "cpu" not in OPS["linear_w4a8"].backends:
        return []
    features = native.cpu_features()
    return [isa for isa, need in ISA_NEEDS.items() if features.get(need) == "yes"] + ["portable"]


def our_isa() -> str:
    """The instruction set that our kernels use in this process; "torch" where there are none."""
    known = available_isas()
    return os.environ.get(ISA_VARIABLE) or known[0] if known else "torch"


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
