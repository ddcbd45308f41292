"""The kernels for NVFP4 as device code: the instruction and the conversions that sm_120f has for it, and no code for
targets that have none."""
from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks.sass import Kernel, find_cuobjdump, kernels
from tests.simt.build import ROOT
from tests.test_cuda_compile import compiled, kernels_in
from tests.test_packaging import builder

PRODUCT = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"
TO_E2M1, TO_E4M3 = "F2FP.SATFINITE.E2M1.F32", "F2FP.SATFINITE.E4M3.F32"
# Cycles of a scheduler's tensor core for a product: 1676 TFLOP/s at 2.41 GHz on the 170·4 of an RTX 5090.
SCHEDULER = 16
LINEAR = re.compile(r"linear_\w*kernel.*TileILi\d+ELi\d+ELi(\d+)ELi(\d+)ELi\d+EEENS0_5Nvfp4E")
LEAST_CODE = 100  # instructions; fewer are an empty kernel
FILES = ("linear_w4a4", "linear_w4a4-gate_residual", "linear_w4a4-gelu_quantize", "linear_w4a4-glu_quantize",
         "linear_w4a4-qkv_rope", "quantize_act", "norm_modulate_quantize")


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = builder.find_nvcc() or pytest.skip("no nvcc to compile device code with")
    return found if find_cuobjdump(found) else pytest.skip("no cuobjdump to read device code with")


@pytest.fixture(scope="module")
def found(nvcc: str) -> list[Kernel]:
    """The kernels for NVFP4 of what an installation builds, for all its targets."""
    objects = builder.compile_cuda(nvcc, builder.cuda_targets(nvcc), ROOT / "build/cuda")
    return [kernel for path in objects if path.stem in FILES for kernel in kernels(find_cuobjdump(nvcc), path)
            if "Nvfp4" in kernel.name]


def names(kernel: Kernel, *prefixes: str) -> list[str]:
    return [name for name in kernel.counts() if name.startswith(prefixes)]


def products(kernel: Kernel) -> Counter[str]:
    """All 4-bit and 8-bit ones; those of 16 bit are the branch's."""
    return Counter({name: kernel.counts()[name] for name in names(kernel, "OMMA", "QMMA", "IMMA")})


def test_only_targets_with_the_instruction_have_code(found: list[Kernel]) -> None:
    assert {kernel.target for kernel in found} == set(builder.CUDA_TARGETS)
    for kernel in found:
        assert (len(kernel.code) >= LEAST_CODE) == (kernel.target == "120f"), (kernel.target, kernel.name)


def test_linears_multiply_natively_and_spill_nothing(found: list[Kernel]) -> None:
    """One product for each pair of a warp's fragments and each of a stage's two steps; copies of 16 bytes."""
    linears = 0
    for kernel in (kernel for kernel in found if kernel.target == "120f"):
        assert not names(kernel, "LDL", "STL"), kernel.name
        match = LINEAR.search(kernel.name)
        if match is None:
            assert not products(kernel), kernel.name
            continue
        rows, columns = map(int, match.groups())
        assert products(kernel) == {PRODUCT: 2 * (rows // 16) * (columns // 8)}, kernel.name
        assert names(kernel, "LDGSTS.E.BYPASS.128"), kernel.name
        linears += 1
    endings, tiles, types = 5, 3, 2
    assert linears == endings * tiles * types


def test_what_quantizes_converts_natively(found: list[Kernel]) -> None:
    quantizing = [kernel for kernel in found if kernel.target == "120f"
                  and ("ToNvfp4" in kernel.name or "linear_next_kernel" in kernel.name)]
    ranks, types, sources, linears = 3, 2, 1 + 2, 2 * 3 * 2
    assert len(quantizing) == ranks * types * sources + linears
    for kernel in quantizing:
        assert names(kernel, TO_E2M1) and names(kernel, TO_E4M3), kernel.name


def test_the_large_tile_leaves_the_tensor_cores_the_narrowest_place(found: list[Kernel]) -> None:
    """An estimate: what a scheduler issues for a product, of the cycles that the product takes."""
    for kernel in found:
        if kernel.target == "120f" and "TileILi128" in kernel.name and "13linear_kernel" in kernel.name:
            loop = Counter(one.kind for one in kernel.loop("OMMA"))
            assert 0 < loop.total() / loop["OMMA"] <= SCHEDULER / 4, kernel.name


def test_every_selector_is_an_instruction(nvcc: str) -> None:
    """Also of the GPUs whose generation is the same."""
    for target in ("120a", "121a", "120f"):
        probes = {kernel.name: kernel for kernel in kernels_in(nvcc, compiled(nvcc, "probes", (target,)))}
        selected, = (kernel for name, kernel in probes.items() if "mma_m16n8k64_nvf4_selected" in name)
        assert products(selected) == {PRODUCT: 8}
        narrow, = (kernel for name, kernel in probes.items() if "narrow_probe" in name)
        assert names(narrow, TO_E2M1) and names(narrow, TO_E4M3)
