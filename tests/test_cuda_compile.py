"""The wrappers of csrc/cuda/common as device code: compiled for every target, and the instructions that came of it."""
from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import cuda_issue
from benchmarks.sass import Kernel, find_cuobjdump, kernels
from tests.simt import build
from tests.test_packaging import builder

ROOT = Path(__file__).parent.parent
TARGETS = ("75", "80", "86", "89", "90", "120a")
S4_TARGETS = ("80", "86", "89")  # where m16n8k64 on 4-bit integers is one instruction

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


def kernels_in(nvcc: str, binary: Path) -> Iterator[Kernel]:
    return kernels(find_cuobjdump(nvcc) or pytest.skip("no cuobjdump to read device code with"), binary)


@pytest.fixture(scope="module")
def instructions(nvcc: str) -> dict[tuple[str, str], Counter[str]]:
    """(target, mangled name of a probe) → how often it has which of the instructions looked for."""
    return {(kernel.target, kernel.name): Counter({name: count for name, count in kernel.counts().items()
                                                   if INSTRUCTION.match(name)})
            for kernel in kernels_in(nvcc, compiled(nvcc, "probes", TARGETS))}


def test_every_target_is_there(instructions: dict) -> None:
    assert {target for target, _ in instructions} >= set(TARGETS)


@pytest.mark.parametrize(("probe", "targets"), NATIVE, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_wrapper_becomes_its_instruction(instructions: dict, probe: str, targets: tuple[str, ...]) -> None:
    length = f"{len('probe_' + probe)}probe_{probe}" if probe.startswith("mma") else f"{len(probe)}{probe}"  # mangled
    for target in targets:
        counts = [count for (of, kernel), count in instructions.items() if of == target and length in kernel]
        assert counts == [Counter(NATIVE[probe, targets])], target


HOPPER_TARGETS = ("75", "90", "90a", "120a")  # 90a is the one that has the instructions


@pytest.fixture(scope="module")
def hopper(nvcc: str) -> list[Kernel]:
    """The kernels of tests/simt/hopper.cu, for each of these targets."""
    return list(kernels_in(nvcc, compiled(nvcc, "hopper", HOPPER_TARGETS)))


def hopper_kernel(hopper: list[Kernel], name: str) -> Counter[str]:
    found, = (kernel for kernel in hopper if kernel.target == "90a" and name in kernel.name)
    counts = found.counts()
    assert not [name for name in counts if name.startswith(("LDL", "STL"))]
    return counts


@pytest.mark.parametrize("registers", (0, 1), ids=("shared", "registers"))
@pytest.mark.parametrize("n", (64, 96, 128, 160, 192, 224, 256))
def test_wgmma_becomes_its_instruction(hopper: list[Kernel], n: int, registers: int) -> None:
    counts = hopper_kernel(hopper, f"wgmma_probeILi{n}ELb{registers}E")
    assert {name: count for name, count in counts.items() if "MMA" in name} == {f"IGMMA.64x{n}x32.S8.S8": 4}
    assert counts["WARPGROUP.ARRIVE"] == counts["WARPGROUP.DEPBAR.LE"] == 1


def test_hopper_wrappers_become_their_instructions(hopper: list[Kernel]) -> None:
    """No barrier of global memory nor emptied cache but for the two times that the cluster meets."""
    counts = hopper_kernel(hopper, "pipeline_kernel")
    once = ("UTMALDG.2D.MULTICAST", "USETMAXREG.TRY_ALLOC.CTAPOOL", "USETMAXREG.DEALLOC.CTAPOOL",
            "SYNCS.ARRIVE.TRANS64")  # this one is mbarrier_expect
    assert {name: counts[name] for name in once} == dict.fromkeys(once, 1)
    assert counts["SYNCS.ARRIVE.TRANS64.RED.A1T0"] == 2  # mbarrier_arrive_at, in the loop and after it
    assert counts["IGMMA.64x64x32.S8.S8"] == 4 and counts["UTMALDG.2D"] == 2
    assert counts["SYNCS.EXCH.64"] == 6 and counts["SYNCS.PHASECHK.TRANS64.TRYWAIT"] >= 2
    assert counts["MEMBAR.ALL.GPU"] == counts["CCTL.IVALL"] == counts["UCGABAR_WAIT"] == 2
    assert hopper_kernel(hopper, "box_probe")["UTMACCTL.PF"] == 1


def test_other_targets_have_no_hopper_code(hopper: list[Kernel]) -> None:
    assert {kernel.target for kernel in hopper} == set(HOPPER_TARGETS)
    for kernel in hopper:
        code = [instruction for instruction in kernel.code if instruction.name != "NOP"]
        assert (len(code) < 8) == (kernel.target != "90a"), (kernel.target, kernel.name)


@pytest.fixture(scope="module")
def objects(nvcc: str) -> list[Path]:
    """What an installation builds, for all its targets."""
    return builder.compile_cuda(nvcc, builder.cuda_targets(nvcc), ROOT / "build/cuda")


# Any linear kernel of mma.sync; its warp's tile, its numbers, unsigned codes.
LINEAR = re.compile(
    r"linear_\w*kernelINS0_4TileILi\d+ELi\d+ELi(\d+)ELi(\d+)ELi\d+EEENS0_4(Int4|Int8)(?:INS\w+?Lb([01])E)?")
HOPPERS = re.compile(r"linear_w4a8_sm90_kernelINS0_8TileSm90ILi(\d+)E")
ENDINGS = 5


def has_code(kernel: Kernel) -> bool:
    return len(kernel.code) >= 100  # less is no code


def products(target: str, rows: int, columns: int, numbers: str, is_unsigned: bool) -> Counter[str]:
    """One for each pair of a warp's fragments and each of a stage's two steps; on sm_75 four smaller ones."""
    shape, parts = ("8832", 4) if target == "75" else ("16864", 1)
    kind = f"{'SU'[is_unsigned]}4.S4"
    if numbers == "Int8":
        shape, kind = ("8816" if target == "75" else "16832"), "S8.S8"
    return Counter({f"IMMA.{shape}.{kind}": parts * 2 * (rows // 16) * (columns // 8)})


@pytest.fixture(scope="module")
def linears(nvcc: str, objects: list[Path]) -> list[Kernel]:
    """All kernels with code that an installation has, for the targets that multiply natively what they are given."""
    return [kernel for binary in objects for kernel in kernels_in(nvcc, binary) if has_code(kernel)]


def test_nothing_is_spilled(linears: list[Kernel]) -> None:
    """Emulated products apart: INT4 from Hopper on, which no mode chooses."""
    for kernel in linears:
        emulated = "4Int4" in kernel.name and kernel.target not in ("75", *S4_TARGETS)
        spilled = [name for name in kernel.counts() if name.startswith(("LDL", "STL"))]
        assert emulated or not spilled, (kernel.target, kernel.name)


@pytest.mark.parametrize(("numbers", "targets"), [
    ("Int4", ("75", *S4_TARGETS)), ("Int8", ("75", *S4_TARGETS, "100", "120f"))])
def test_linears_multiply_natively(linears: list[Kernel], numbers: str, targets: tuple[str, ...]) -> None:
    """The products that there should be, and no other way to multiply integers; copies of 16 bytes. On sm_75 there is
    code for float16 and the smaller tiles."""
    found = Counter()
    for kernel in linears:
        match = LINEAR.search(kernel.name)
        if kernel.target not in targets or not match or match[3] != numbers:
            continue
        counts = kernel.counts()
        have = Counter({name: count for name, count in counts.items() if name.startswith("IMMA")})
        rows, columns = map(int, match.groups()[:2])
        assert have == products(kernel.target, rows, columns, numbers, match[4] == "1"), (kernel.target, kernel.name)
        copy = "LDG.E.128" if kernel.target == "75" else "LDGSTS.E.BYPASS.128"
        assert any(name.startswith(copy) for name in counts), (kernel.target, kernel.name)
        found[kernel.target] += 1
    signs = 2 if numbers == "Int4" else 0  # two endings take unsigned codes, too
    assert found == {target: (2 * 1 if target == "75" else 3 * 2) * (ENDINGS + signs) for target in targets}


def test_hopper_multiplies_by_wgmma_what_tma_brings(linears: list[Kernel]) -> None:
    """A stage is four products of 64 rows; the branch's are mma."""
    found = Counter()
    for kernel in linears:
        if match := HOPPERS.search(kernel.name):
            counts = kernel.counts()
            products = {name: count for name, count in counts.items() if name.startswith(("IGMMA", "IMMA"))}
            assert kernel.target == "90a" and products == {f"IGMMA.64x{match[1]}x32.S8.S8": 4}, kernel.name
            assert any(name.startswith("UTMALDG.2D.MULTICAST") for name in counts)
            assert "USETMAXREG.DEALLOC.CTAPOOL" in counts
            found[match[1]] += 1
        assert not (kernel.target == "90a" and "4Int8" in kernel.name), "Hopper has a kernel of its own"
    assert found == {"256": 2 * ENDINGS, "192": 2 * (ENDINGS - 1), "128": 2 * ENDINGS}  # heads lie in 128 columns


def test_instructions_for_each_product(objects: list[Path]) -> None:
    """The main loop of the large tile must leave the tensor cores of sm_86 and 89 the narrower place: 16 cycles, and
    a quarter of them free."""
    large = {kernel.target: cuda_issue.Loop.of(kernel) for kernel in cuda_issue.plain_kernels()
             if "128 × 128" in cuda_issue.tile(kernel)}
    assert set(large) == set(S4_TARGETS) and max(loop.issued for loop in large.values()) <= 12
    assert {target for target, loop in large.items() if loop.narrowest == "tensor cores"} == {"86", "89"}


@pytest.mark.parametrize(("target", "header", "call", "words"), (
    ("75", "mma", "float c[4] = {}; mma_m16n8k16<bf16>(c, {1, 2, 3, 4}, {5, 6}); *y = c[0];",
     "mma_m16n8k16_bf16 needs sm_80"),
    ("90", "wgmma", "int d[32] = {}; wgmma_m64k32_s8<64>(d, 1, 2, true); *y = d[0];",
     "wgmma_m64k32_s8 needs sm_90a"),
    ("90a", "wgmma", "int d[36] = {}; wgmma_m64k32_s8<72>(d, 1, 2, true); *y = d[0];",
     "wgmma_m64k32_s8 has 64 to 256 columns, in steps of 32"),
    ("100", "cluster", "more_registers<240>();", "more_registers needs sm_90a"),
    ("90a", "cluster", "more_registers<100>();", "a thread has 24 to 256 registers, in eights"),
    ("89", "tma", "mbarrier_arrive(reinterpret_cast<Barrier*>(y));", "mbarrier_arrive needs sm_90"),
))
def test_what_a_target_does_not_have_is_refused_in_a_sentence(nvcc: str, tmp_path: Path, target: str, header: str,
                                                              call: str, words: str) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(f"""#include "cuda/common/{header}.cuh"
    using namespace nunchaku_py::cuda;
    __global__ void kernel(float* y) {{ {call} }}""")
    command = nvcc_command(nvcc, "-cubin", f"-arch=sm_{target}", str(source), "-o", str(tmp_path / "out.cubin"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stdout + done.stderr


def test_only_common_has_assembly() -> None:
    for path in (ROOT / "csrc/cuda").rglob("*.*"):
        if path.parent.name != "common":
            assert not re.search(r"\basm\b", path.read_text()), f"{path}: PTX belongs in csrc/cuda/common"
