"""attention, compiled for GPUs that are not here: which instructions multiply, and whether registers suffice."""
from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.triton.compiling import TARGETS, Compiled

FP8_TARGETS = tuple(target for target in TARGETS if target >= 89)
# What is not by the instructions of 8.0. INT8 on 10.0 is: Triton does not use tcgen05 for it.
INT8 = {90: "wgmma.mma_async.sync.aligned.m64"}
FP8 = {90: ("wgmma.mma_async", ".f32.e4m3.e4m3"), 100: ("tcgen05.mma", "kind::f8f6f4")}
HALF = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Bytes of a thread in local memory where the last keys are not a whole tile; elsewhere nothing spills.
TAIL = {100: 256, 120: 16}

Found = Callable[[int], list[Compiled]]


def kernels_of(compiled: Found, target: int, kernel: str, products: str = "") -> list[Compiled]:
    found = [one for one in compiled(target) if one.kernel == kernel and one.call.startswith(f"attention: {products}")]
    assert found
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_scores_are_multiplied_in_int8(compiled, target):
    for one in kernels_of(compiled, target, "attend"):
        family = INT8.get(target, "mma.sync.aligned.m16n8k32")
        assert any(name.startswith(family) and "s32.s8.s8" in name for name in one.multiplies), one


@pytest.mark.parametrize("target", FP8_TARGETS)
def test_p_and_v_are_multiplied_in_fp8(compiled, target):
    family, types = FP8.get(target, ("mma.sync.aligned.m16n8k32", ".f32.e4m3.e4m3.f32"))
    for one in kernels_of(compiled, target, "attend", "fp8"):
        assert any(name.startswith(family) and types in name for name in one.multiplies), one


@pytest.mark.parametrize("target", TARGETS)
def test_p_and_v_are_multiplied_in_16_bit(compiled, target):
    for one in kernels_of(compiled, target, "attend", "16bit"):
        assert any(name.startswith(HALF.get(target, "mma.sync.aligned.m16n8k16")) for name in one.multiplies), one
        assert not any("e4m3" in name or "f8f6f4" in name for name in one.multiplies)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["statistics", "quantize_keys", "quantize_queries", "attend"])
def test_registers_suffice(compiled, target, kernel):
    for one in kernels_of(compiled, target, kernel):
        tail = kernel == "attend" and one.constants["TAIL"] == "True"
        assert one.stack <= (TAIL.get(target, 0) if tail else 0), one
