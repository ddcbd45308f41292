"""What the INT4 main loops ask of a scheduler for each m16n8k64 product on the tensor cores, read from device code.

    python -m benchmarks.cuda_issue                  for every tile and target: a table, and the kinds of instructions
    python -m benchmarks.cuda_issue --target 89

From that, an ESTIMATE of the part of the INT4 peak that a loop can reach at most: a scheduler issues one instruction a
cycle, its float lanes take a warp's instruction in one cycle or two, and its tensor core takes some for a product.
Memory, latency and clocks are not in it: it is no measurement, and no kernel is faster than it says.
"""
from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass

from benchmarks.machine import ROOT, setup_module
from benchmarks.sass import Kernel, find_cuobjdump, kernels

FLOAT = ("FFMA", "FMUL", "FADD", "IMAD")  # what the float lanes do
PLAIN = re.compile(
    r"13linear_kernel.*TileILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi\d+EEENS0_4Int4INS0_(4bf16|3f16)ELb0E.*5Store")


@dataclass(frozen=True)
class Machine:
    """Of a scheduler, a quarter of a multiprocessor; from data sheets."""

    product: int  # cycles of its tensor core for an m16n8k64
    float_cycles: int  # for a warp's instruction, of its 32 or 16 lanes
    products: int = 1  # instructions that make one
    dtype: str = "bf16"


MACHINES = {  # INT4 peaks: RTX 2080 Ti 430, A100 1248, RTX 3090 568, RTX 4090 1321 TOPS
    "75": Machine(16, 2, 4, "f16"), "80": Machine(8, 2), "86": Machine(16, 1), "89": Machine(16, 1),
}


@dataclass(frozen=True)
class Loop:
    """A main loop, for one m16n8k64."""

    machine: Machine
    kinds: dict[str, float]  # how many instructions of which kind

    @classmethod
    def of(cls, kernel: Kernel) -> Loop:
        machine, counts = MACHINES[kernel.target], Counter(one.kind for one in kernel.loop("IMMA"))
        return cls(machine, {kind: count * machine.products / counts["IMMA"] for kind, count in counts.most_common()})

    @property
    def issued(self) -> float:
        return sum(self.kinds.values())

    @property
    def cycles(self) -> dict[str, float]:
        on_lanes = sum(self.kinds.get(kind, 0) for kind in FLOAT)
        return {"tensor cores": self.machine.product, "issue": self.issued,
                "float lanes": on_lanes * self.machine.float_cycles}

    @property
    def narrowest(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def of_peak(self) -> float:
        return self.machine.product / self.cycles[self.narrowest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=MACHINES)
    target = parser.parse_args().target
    print("target  tile (warp)        instructions   of the INT4 peak, at most (estimate), for its narrowest place")
    for kernel in plain_kernels():
        if target in (None, kernel.target):
            print(line(kernel))


def plain_kernels() -> list[Kernel]:
    """linear_w4a4 itself, with signed codes, for every tile and native target, as an installation builds it."""
    builder = setup_module()
    nvcc = builder.find_nvcc()
    cuobjdump = nvcc and find_cuobjdump(nvcc)
    if not cuobjdump:
        raise SystemExit("nvcc and cuobjdump are needed: none was found")
    objects = builder.compile_cuda(nvcc, builder.cuda_targets(nvcc), ROOT / "build/cuda")
    found = [kernel for path in objects if path.stem == "linear_w4a4" for kernel in kernels(cuobjdump, path)
             if _is_plain(kernel)]
    return sorted(found, key=lambda kernel: (kernel.target, PLAIN.search(kernel.name)[1].zfill(4)))


def _is_plain(kernel: Kernel) -> bool:
    match, machine = PLAIN.search(kernel.name), MACHINES.get(kernel.target)
    return bool(match and machine and match[5].endswith(machine.dtype) and kernel.loop("IMMA"))


def tile(kernel: Kernel) -> str:
    rows, columns, *warp = PLAIN.search(kernel.name).groups()[:4]
    return f"{rows:>3} × {columns} ({' × '.join(warp)})"


def line(kernel: Kernel) -> str:
    loop = Loop.of(kernel)
    kinds = ", ".join(f"{kind} {count:.2f}" for kind, count in list(loop.kinds.items())[:9])
    return (f"sm_{kernel.target}   {tile(kernel)}   {loop.issued:5.1f}        {100 * loop.of_peak:4.0f} %, "
            f"{loop.narrowest}: {kinds}")


if __name__ == "__main__":
    main()
