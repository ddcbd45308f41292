"""`nunchaku-py info`: versions, devices, what was built, and which backend serves which op, or why it does not."""
from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from .tables import table

SUMMARY = "versions, devices, and which backends serve the operators here"
DESCRIPTION = ("Print versions, devices, what the native module was built with, and for every operator which backend\n"
               "runs it on this machine and why the others do not. Needs no GPU and never fails.")
EXAMPLES = "  nunchaku-py info\n  NUNCHAKU_PY_BACKEND=torch nunchaku-py info\n"

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors")
SWITCHES = {
    "NUNCHAKU_PY_BACKEND": "run: the only backend to use (cuda, triton, cpu, torch)",
    "NUNCHAKU_PY_CPU_ISA": "run: instruction set of the CPU kernels (amx, avx512_bf16, avx512, avx_vnni, avx2, …)",
    "NUNCHAKU_PY_FUSION": "run: 0 lets the linears of a model run one by one",
    "NUNCHAKU_PY_LITE": "run: auto, always or never our kernels for diffusers' nunchaku_lite folders",
    "NUNCHAKU_PY_TUNING": "run: 0 ignores what `nunchaku-py tune` has measured",
    "NUNCHAKU_PY_CACHE": "run: the folder that it is kept in (default: nunchaku_py in the user's cache folder)",
    "NUNCHAKU_PY_CUDA": "build: auto, 0 (CPU part only) or 1 (CUDA part or an error)",
    "NUNCHAKU_PY_CUDA_TARGETS": 'build: compute capabilities, such as "80;89", or native',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    for title, part in (("versions", _versions), ("devices", _devices), ("native", _native), ("operators", _operators),
                        ("default modes", _modes), ("environment", _environment)):
        print(f"{title}\n{_safely(part)}\n")
    return 0


def _safely(part: Callable[[], str]) -> str:
    """Whatever is broken here, the other parts are still printed: they are what helps."""
    try:
        text = part()
    except Exception as error:
        text = f"not known: {type(error).__name__}: {error}"
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _versions() -> str:
    from .. import __version__

    rows = [("nunchaku-py", __version__), ("python", platform.python_version()), ("system", platform.platform())]
    return table(("what", "version"), [*rows, *((name, _version(name)) for name in PACKAGES)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def device_names() -> list[str]:
    import torch

    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if _cuda() else 0))]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _devices() -> str:
    import torch

    rows = [("cpu", platform.processor() or platform.machine(), f"{torch.get_num_threads()} threads", "")]
    for name in device_names():
        if name.startswith("cuda"):
            seen = torch.cuda.get_device_properties(name)
            rows.append((name, seen.name, f"{seen.total_memory / 2**30:.1f} GiB", f"sm_{seen.major}{seen.minor}"))
    note = "" if _cuda() else f"\nno CUDA device: torch was built for {torch.version.cuda or 'the CPU only'}" \
        if torch.version.cuda is None else "\nno CUDA device: the driver shows none"
    return table(("device", "name", "size", "capability"), rows) + note


def _native() -> str:
    from .. import native

    return "\n".join(native.report())


def _operators() -> str:
    """One line per op and device kind; ops that are served alike share a line."""
    from .. import ops  # noqa: F401 (registers them)
    from ..ops.registry import OPS, ORDER, forced_backend

    alike: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(device.partition(":")[0] for device in device_names()):
        for fmt in ("int4", "nvfp4"):
            for op in OPS.values():
                answers = _explained(op, fmt, name)
                alike.setdefault((f"{name} {fmt}", *(answers[backend] for backend in ORDER)), []).append(op.name)
    merged: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (where, *answers), names in alike.items():
        merged.setdefault((tuple(names), tuple(answers)), []).append(where)
    rows = [("; ".join(where), _shortened(names), *answers) for (names, answers), where in merged.items()]
    forced = f"\nforced by NUNCHAKU_PY_BACKEND: {forced_backend()}" if forced_backend() else ""
    return table(("device and format", "operators", *ORDER), rows) + forced


def _explained(op: object, fmt: str, device: str) -> dict[str, str]:
    from .op_samples import sample

    return op.explain(*sample(op, fmt, device))


def _shortened(names: tuple[str, ...]) -> str:
    """A family of linears is one word where all of it is there, and so are all 15."""
    from ..ops.registry import OPS

    for family in ("linear_", "linear_w4a4", "linear_w4a8", "linear_w4a16"):
        members = [name for name in OPS if name.startswith(family)]
        if set(members) <= set(names):
            names = (f"{family}* ({len(members)})", *(name for name in names if name not in members))
    return ", ".join(names)


def _modes() -> str:
    import torch

    from ..site import Site, auto_mode, auto_weights

    sites = {"int4 file": Site("w4a4", "int4", 64), "nvfp4 file": Site("w4a4", "nvfp4", 16),
             "weight-only sites": Site("w4a16", "int4", 64)}
    devices = [torch.device(name) for name in device_names()]
    defaults = table(("device", *sites, "weights in a8"), [
        (str(device), *(auto_mode(site, device) for site in sites.values()), auto_weights(device))
        for device in devices])
    return (f"{defaults}\nanother mode for a model: mode= of load and quantize, nq.set_mode(model, mode), --mode; "
            "weights: nq.set_weights(model, …)")


def _environment() -> str:
    return table(("switch", "value", "meaning"),
                 [(name, os.environ.get(name, "(not set)"), meaning) for name, meaning in SWITCHES.items()])
