"""The machine and the software that something was measured with, and how much memory there is and is taken."""
from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")  # where a container's limit stands
PACKAGES = ("torch", "diffusers", "transformers")


def installed(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def memory() -> dict[str, int]:
    """Bytes of this process by the kernel's names: VmRSS now, VmHWM at most, RssAnon its own, RssFile mapped files.

    Not getrusage where Linux tells: its peak begins with that of the process which started this one. Elsewhere only the
    first two are known."""
    if STATUS.exists():
        pairs = (line.partition(":")[::2] for line in STATUS.read_text().splitlines())
        return {name: 1024 * int(rest.split()[0]) for name, rest in pairs if name.startswith(("VmRSS", "VmHWM", "Rss"))}
    import psutil  # accelerate requires it

    taken = psutil.Process().memory_info()
    return {"VmRSS": taken.rss, "VmHWM": max(taken.rss, getattr(taken, "peak_wset", 0), _largest())}


def _largest() -> int:
    """By getrusage, in bytes on macOS; Windows has none."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Let the peak begin anew with what is taken now; False where the system does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_left() -> int:
    """Bytes that new processes may take, the least of what the machine and a container's limit leave."""
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_group()])


def _left_in_group() -> Iterator[int]:
    """Pages of files that were only read do not count: they make room."""
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        taken = int((CONTROL_GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if limit.isdigit():
        yield int(limit) - taken + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def versions() -> str:
    from .. import __version__

    return ", ".join([f"nunchaku-py {__version__}", f"python {installed('python')}",
                      *(f"{name} {installed(name)}" for name in PACKAGES)])


def kernels() -> str:
    """What runs our linears on a CPU."""
    from .. import native
    from ..ops.registry import forced_backend

    if native.module is None or forced_backend() == "torch":
        return "plain PyTorch operators"
    return f"CPU kernels for {native.cpu_isa()}"
