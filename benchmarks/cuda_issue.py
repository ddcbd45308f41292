"""How many instructions the INT4 main loops issue for each multiplication on the tensor cores, read from device code.

    python -m benchmarks.cuda_issue                  for every tile and target: a table, and the kinds of instructions
    python -m benchmarks.cuda_issue --target 89

From that, an ESTIMATE of the part of the INT4 peak that issuing alone would allow: a scheduler issues one instruction a
cycle, and its tensor core takes `CYCLES` for one m16n8k64. Memory, latency and clocks are not in it: it is no
measurement, and no kernel is faster than it says.
"""
from __future__ import annotations

import argparse
import re
from collections import Counter

from benchmarks.machine import ROOT, setup_module
from benchmarks.sass import Kernel, find_cuobjdump, kernels

CYCLES = {"80": 8, "86": 16, "89": 16}  # from the peaks of data sheets: A100 1248, RTX 3090 568, RTX 4090 1321 TOPS
PLAIN = re.compile(r"18linear_w4a4_kernel.*TileILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi\d+EEELb0E.*4bf16.*5Store")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=CYCLES)
    target = parser.parse_args().target
    print("target  tile (warp)        per IMMA   of the INT4 peak, at most (estimate)")
    for kernel in plain_kernels():
        if target in (None, kernel.target):
            print(line(kernel))


def plain_kernels() -> list[Kernel]:
    """linear_w4a4 itself, in bf16 with signed codes, for every tile and native target, as an installation builds it."""
    builder = setup_module()
    nvcc = builder.find_nvcc()
    cuobjdump = nvcc and find_cuobjdump(nvcc)
    if not cuobjdump:
        raise SystemExit("nvcc and cuobjdump are needed: none was found")
    objects = builder.compile_cuda(nvcc, builder.cuda_targets(nvcc), ROOT / "build/cuda")
    found = [kernel for path in objects if path.name.startswith("linear_w4a4") for kernel in kernels(cuobjdump, path)
             if kernel.target in CYCLES and PLAIN.search(kernel.name)]
    return sorted(found, key=lambda kernel: (kernel.target, PLAIN.search(kernel.name)[1].zfill(4)))


def line(kernel: Kernel) -> str:
    counts = Counter(instruction.kind for instruction in kernel.loop("IMMA"))
    products, issued = counts["IMMA"], counts.total()
    rows, columns, *warp = PLAIN.search(kernel.name).groups()
    share = min(1.0, CYCLES[kernel.target] * products / issued)
    kinds = ", ".join(f"{kind} {count / products:.2f}" for kind, count in counts.most_common(9))
    return (f"sm_{kernel.target}   {rows:>3} × {columns} ({' × '.join(warp)})   {issued / products:5.1f}      "
            f"{100 * share:4.0f} %    {kinds}")


if __name__ == "__main__":
    main()
