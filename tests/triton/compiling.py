"""Compiling for GPUs that are not here: kernels are launched with tensors of this machine, and compiled for a target
instead of run.

    python -m tests.triton.compiling 90 FILE    writes what tests/triton/calls.py launches, compiled for 9.0, as JSON

A process of its own, without TRITON_INTERPRET: a kernel is compiled or interpreted for as long as a process lives.
"""
from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = (80, 86, 89, 90, 100, 120)
MULTIPLY = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|mma)\.[\w.:]+)")
FROM_REGISTERS = re.compile(r"wgmma\.mma_async[\w.]+\s*\{[^}]*\}\s*,\s*\{")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+).*?SHARED:(\d+)", re.DOTALL)


class Compiled(NamedTuple):
    """One kernel of a call. `multiplies`: instruction of PTX → how often it stands there; `from_registers`: how many of
    Hopper's take their first operand from registers; `copies`: instructions that load to shared memory and wait for
    nothing; `stack`: bytes a thread has in local memory, where registers spill to."""

    target: int
    call: str
    kernel: str
    constants: dict[str, Any]
    multiplies: dict[str, int]
    from_registers: int
    copies: int
    registers: int
    stack: int
    shared: int


class Target:
    """Stands where Triton's driver stands."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.target, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextmanager
def compiling(target: int, found: list[Compiled]) -> Iterator[Callable[[str], None]]:
    """Within it launches are compiled for the target and put into `found`, under the name given last."""
    import torch
    import triton

    from nunchaku_py.backends.triton import device
    from nunchaku_py.kernels import launch

    triton.runtime.driver.set_active(Target(target))
    device.DEVICE, device.capability_of = "cpu", lambda of: divmod(target, 10)
    name = [""]

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any):
        made = kernel.warmup(*args, grid=grid, num_warps=warps, num_stages=stages, **constants)
        plain = {key: str(value) for key, value in constants.items()}
        found.append(Compiled(target, name[0], kernel.__name__, plain, *_read(made)))

    original, launch.launch = launch.launch, compile_only
    try:
        with torch.no_grad():
            yield lambda called: name.__setitem__(0, called)
    finally:
        launch.launch = original


def _read(made: Any) -> tuple[dict[str, int], int, int, int, int, int]:
    ptx = made.asm["ptx"]
    counts, from_registers = collections.Counter(MULTIPLY.findall(ptx)), len(FROM_REGISTERS.findall(ptx))
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, _ = map(int, RESOURCES.search(usage.stdout).groups())
    return dict(counts), from_registers, ptx.count("cp.async.cg"), registers, stack, made.metadata.shared


def compiled_for(target: int, path: Path) -> list[Compiled]:
    """What calls.py launches, compiled in a process of its own; its result stays in `path`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.compiling", str(target), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    return [Compiled(*row) for row in json.loads(path.read_text())]


def main(target: int, path: Path) -> None:
    from tests.triton import calls

    found: list[Compiled] = []
    with compiling(target, found) as named:
        for name, call in calls.of(target):
            named(name)
            call()
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
