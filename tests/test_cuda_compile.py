"""The wrappers of csrc/cuda/common as device code: compiled for every target, and the instructions that came of it."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.simt import build
from tests.test_packaging import builder

ROOT = Path(__file__).parent.parent
TARGETS = ("75", "80", "86", "89", "90", "120a")
S4_TARGETS = ("80", "86", "89")  # where m16n8k64 on 4-bit integers is one instruction
TRITON = Path("triton/backends/nvidia/bin")  # where Triton keeps the tools that it brings along

LDMATRIX = {f"LDSM.16.{kind}{count}": 1 for kind in ("M88", "MT88") for count in ("", ".2", ".4")}
NATIVE = {  # probe of tests/simt/probes.cuh, targets → how often it has which instruction
    ("mma_m8n8k32_s4", ("75", *S4_TARGETS)): {"IMMA.8832.S4.S4": 1},
    ("mma_m8n8k32_s4_from", ("75", *S4_TARGETS)): {"IMMA.8832.S4.S4": 1},
    ("mma_m8n8k32_u4s4", ("75", *S4_TARGETS)): {"IMMA.8832.U4.S4": 1},
    ("mma_m8n8k32_u4s4_from", ("75", *S4_TARGETS)): {"IMMA.8832.U4.S4": 1},
    ("mma_m16n8k64_s4", S4_TARGETS): {"IMMA.16864.S4.S4": 1},
    ("mma_m16n8k64_s4_from", S4_TARGETS): {"IMMA.16864.S4.S4": 1},
    ("mma_m16n8k64_u4s4", S4_TARGETS): {"IMMA.16864.U4.S4": 1},
    ("mma_m16n8k64_u4s4_from", S4_TARGETS): {"IMMA.16864.U4.S4": 1},
    ("mma_m16n8k64_s4", ("90", "120a")): {"IMMA.16832.S8.S8": 2},  # emulated
    ("mma_m8n8k16_s8", ("75", *S4_TARGETS)): {"IMMA.8816.S8.S8": 1},
    ("mma_m16n8k32_s8", TARGETS[1:]): {"IMMA.16832.S8.S8": 1},
    ("mma_m16n8k8_f16", TARGETS): {"HMMA.1688.F32": 1},
    ("mma_m16n8k16_f16", TARGETS[1:]): {"HMMA.16816.F32": 1},
    ("mma_m16n8k16_bf16", TARGETS[1:]): {"HMMA.16816.F32.BF16": 1},
    ("mma_m16n8k64_nvf4", ("120a",)): {"OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X": 1},
    ("ldmatrix_probe", TARGETS): LDMATRIX,
    ("copy_probe", ("75",)): {},
    ("copy_probe", TARGETS[1:]): {"LDGSTS.E.BYPASS.128.ZFILL": 1, "LDGSTS.E.64.ZFILL": 1, "LDGSTS.E.ZFILL": 1},
    ("shuffle_probe", TARGETS): {"SHFL.BFLY": 2, "SHFL.DOWN": 2, "SHFL.IDX": 2},
    ("approx_probe", TARGETS): {"MUFU.EX2": 1, "MUFU.TANH": 1, "MUFU.RCP": 1, "MUFU.RSQ": 1},
}
INSTRUCTION = re.compile(r"\b(?:IMMA|HMMA|OMMA|LDSM|LDGSTS|SHFL|MUFU)[.A-Z0-9]*")


def find_cuobjdump(nvcc: str) -> str | None:
    folders = [Path(nvcc).resolve().parent, Path("/usr/local/cuda/bin"), *(Path(entry) / TRITON for entry in sys.path)]
    found = (shutil.which("cuobjdump", path=path) for path in (None, *map(str, folders)))
    return next(filter(None, found), None)


def nvcc_command(nvcc: str, *arguments: str) -> list[str]:
    return [nvcc, "-std=c++20", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/simt'}", *arguments]


@pytest.fixture(scope="module")
def nvcc() -> str:
    return builder.find_nvcc() or pytest.skip("no nvcc to compile device code with")


def compiled(nvcc: str, name: str, targets: tuple[str, ...]) -> Path:
    """tests/simt/`name`.cu for all of these targets."""
    codes = (f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets)
    command = nvcc_command(nvcc, "-fatbin", *codes, str(ROOT / f"tests/simt/{name}.cu"))
    return build.cached(command, name, ".fatbin")


def instructions_in(nvcc: str, binary: Path) -> dict[tuple[str, str], Counter[str]]:
    """(target, mangled name of a kernel) → how often it has which of the instructions looked for."""
    cuobjdump = find_cuobjdump(nvcc) or pytest.skip("no cuobjdump to read device code with")
    listing = subprocess.run([cuobjdump, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    target = kernel = ""
    for line in listing.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = match[1]
            found[target, kernel].clear()
        else:
            found[target, kernel].update(INSTRUCTION.findall(line))
    return found


@pytest.fixture(scope="module")
def instructions(nvcc: str) -> dict[tuple[str, str], Counter[str]]:
    """Of the probes."""
    return instructions_in(nvcc, compiled(nvcc, "probes", TARGETS))


def test_every_target_is_there(instructions: dict) -> None:
    assert {target for target, _ in instructions} >= set(TARGETS)


@pytest.mark.parametrize(("probe", "targets"), NATIVE, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_wrapper_becomes_its_instruction(instructions: dict, probe: str, targets: tuple[str, ...]) -> None:
    length = f"{len('probe_' + probe)}probe_{probe}" if probe.startswith("mma") else f"{len(probe)}{probe}"  # mangled
    for target in targets:
        counts = [count for (of, kernel), count in instructions.items() if of == target and length in kernel]
        assert counts == [Counter(NATIVE[probe, targets])], target


def test_kernels_are_made_of_native_instructions(nvcc: str) -> None:
    """A warp's tile of 64 × 64 is 4 × 8 products for each group; there is no other way to multiply 4-bit integers."""
    kernels = instructions_in(nvcc, compiled(nvcc, "kernels", ("80", "89")))
    linears = {key: counts for key, counts in kernels.items() if "linear_w4a4" in key[1]}
    assert len(linears) == 2 * 5 and sum("quantize_act_kernel" in kernel for _, kernel in kernels) == 2 * 2
    for (target, kernel), counts in linears.items():
        found = {name: count for name, count in counts.items() if name.startswith("IMMA")}
        unsigned = "GateResidual" in kernel
        assert found == {f"IMMA.16864.{'U4' if unsigned else 'S4'}.S4": 32}, (target, kernel)
        assert any(name.startswith("LDGSTS.E.BYPASS.128") for name in counts), (target, kernel)


def test_a_target_without_the_instruction_is_refused_in_a_sentence(nvcc: str, tmp_path: Path) -> None:
    source = tmp_path / "turing.cu"
    source.write_text("""#include "cuda/common/mma.cuh"
    using namespace nunchaku_py::cuda;
    __global__ void kernel(float* y) {
      float c[4] = {};
      mma_m16n8k16<bf16>(c, {1, 2, 3, 4}, {5, 6});
      *y = c[0];
    }""")
    done = subprocess.run(nvcc_command(nvcc, "-cubin", "-arch=sm_75", str(source), "-o", str(tmp_path / "out.cubin")),
                          capture_output=True, text=True)
    assert done.returncode != 0 and "mma_m16n8k16_bf16 needs sm_80" in done.stdout + done.stderr


def test_only_common_has_assembly() -> None:
    for path in (ROOT / "csrc/cuda").rglob("*.*"):
        if path.parent.name != "common":
            assert not re.search(r"\basm\b", path.read_text()), f"{path}: PTX belongs in csrc/cuda/common"
