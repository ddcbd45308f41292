"""The compiled part of the package (`nunchaku_py._native`, from csrc/): what is there, and why not what is missing.

Nothing here looks for a GPU unless `cuda_devices` is called. `python -m nunchaku_py.native` prints all of it.
"""

from __future__ import annotations

import importlib
import platform
import sys
from functools import cache

from .errors import NunchakuError

try:
    module = importlib.import_module("nunchaku_py._native")
except ModuleNotFoundError:
    module, _absence = None, "it was not built at installation, and `pip install -v` says why"
except ImportError as error:
    module, _absence = None, f"it does not load: {error}"


def status() -> str:
    """What the native module was built with, or why it is absent, in a sentence."""
    if module is None:
        return f"native module: absent, {_absence}; plain PyTorch and Triton serve instead"
    targets = f" for {', '.join(cuda_targets())}" if cuda_targets() else ""
    return f"native module: CPU part built by {module.compiler}; CUDA part {module.cuda_status}{targets}"


def cpu_features() -> dict[str, str]:
    """Instruction set -> "yes", "no", or what stands in its way. Empty off 64-bit x86 and without the module."""
    return module.cpu_features() if module else {}


@cache
def cpu_isa() -> str:
    """The instruction set that the CPU ops run on: the best that this CPU has, or the one NUNCHAKU_PY_CPU_ISA names.
    Chosen once per process."""
    try:
        return module.cpu_isa()
    except RuntimeError as error:
        raise NunchakuError(str(error)) from None


def cpu_isas() -> dict[str, str]:
    """Instruction set that the CPU ops are compiled for, the best first -> why this process cannot use it, or ""."""
    return dict(module.cpu_isas()) if module else {}


def cuda_targets() -> tuple[str, ...]:
    """The compute capabilities that the CUDA part was compiled for, such as ("80", "90a"); empty without one."""
    return tuple(filter(None, module.cuda_targets.split(";"))) if module else ()


def why_not_this_driver() -> str:
    """Why the NVIDIA driver of this machine runs nothing of the CUDA part, such as that it is older; or ""."""
    return module.why_not_this_driver()


def cuda_devices() -> list[dict]:
    """One dict per GPU: name, capability (major, minor), memory in bytes, target (the compiled one that ran there,
    0: none) and problem (why none ran). Looks when called; a RuntimeError says why there are none."""
    if not cuda_targets():
        raise RuntimeError(f"no GPU can be looked at: {status()}")
    return module.cuda_devices()


def report() -> list[str]:
    """`status`, the CPU and the GPUs, a line each."""
    features = cpu_features()
    usable = [name for name, state in features.items() if state == "yes"]
    blocked = [f"{name} ({state})" for name, state in features.items() if state not in ("yes", "no")]
    cpu = ", ".join(usable + blocked) if features else "no instruction sets to choose from"
    lines = [status(), f"CPU: {platform.machine()}: {cpu or 'none of ' + ', '.join(features)}"]
    lines += [_isa_line()] if module else []
    try:
        lines += [_device_line(index, device) for index, device in enumerate(cuda_devices())]
    except RuntimeError as error:
        lines.append(f"GPU: {error}" if cuda_targets() else "GPU: not looked at, there is no CUDA part")
    return lines


def _isa_line() -> str:
    try:
        chosen = cpu_isa()
    except NunchakuError as error:
        return f"CPU kernels: none run, {error}"
    better = list(cpu_isas())[:list(cpu_isas()).index(chosen)]
    why = "; ".join(f"not {name}: {cpu_isas()[name] or 'another was asked for'}" for name in better)
    threads = f"; threads: {module.cpu_threading()}" if "torch" in sys.modules else ""
    return f"CPU kernels: run on {chosen}{f' ({why})' if why else ''}{threads}"


def _device_line(index: int, device: dict) -> str:
    capability = "compute capability {}.{}".format(*device["capability"])
    memory = f"{device['memory'] / 2**30:.1f} GiB"
    ran = f"runs target {device['target']}" if device["target"] else f"runs no compiled target: {device['problem']}"
    return f"GPU {index}: {device['name']}, {capability}, {memory}, {ran}"


if __name__ == "__main__":
    print("\n".join(report()))
