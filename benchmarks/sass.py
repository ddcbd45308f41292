"""Device code as the disassembler shows it: kernels with their instructions, and the loops in them."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRITON = Path("triton/backends/nvidia/bin")  # where Triton keeps the tools that it brings along
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]*)(.*?);")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers, without a predicate
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


@dataclass
class Kernel:
    target: str
    name: str  # mangled
    code: list[Instruction]

    def counts(self) -> Counter[str]:
        return Counter(instruction.name for instruction in self.code)

    def loop(self, kind: str) -> list[Instruction]:
        """The shortest loop that has an instruction of this kind; empty if none has."""
        places = {instruction.address: i for i, instruction in enumerate(self.code)}
        found: list[list[Instruction]] = []
        for i, instruction in enumerate(self.code):
            target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.kind == "BRA" else None
            begin = places.get(int(target[1], 16)) if target else None
            if begin is not None and begin <= i and any(one.kind == kind for one in self.code[begin:i]):
                found.append(self.code[begin:i + 1])
        return min(found, key=len, default=[])


def find_cuobjdump(nvcc: str) -> str | None:
    folders = [Path(nvcc).resolve().parent, Path("/usr/local/cuda/bin"), *(Path(entry) / TRITON for entry in sys.path)]
    found = (shutil.which("cuobjdump", path=path) for path in (None, *map(str, folders)))
    return next(filter(None, found), None)


def kernels(cuobjdump: str, binary: Path) -> Iterator[Kernel]:
    listing = subprocess.run([cuobjdump, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    target, kernel = "", None
    for line in listing.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            if kernel:
                yield kernel
            kernel = Kernel(target, match[1], [])
        elif kernel and (match := _LINE.search(line)):
            kernel.code.append(Instruction(int(match[1], 16), match[2], match[3]))
    if kernel:
        yield kernel
