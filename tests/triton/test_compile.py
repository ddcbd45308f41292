"""Every Triton kernel compiles for every GPU it is made for, to the instructions it is made for, and holds what it
computes in registers."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from nunchaku_py.kernels.gpu import SHARED
from tests.triton import calls
from tests.triton.compiling import TARGETS, Compiled

ON_TARGETS = pytest.mark.parametrize("target", TARGETS)
LITTLE = 64  # bytes of a thread, sixteen registers; a tile that does not fit takes hundreds
Compile = Callable[[int], list[Compiled]]


def products(compiled: list[Compiled], call: str) -> Iterator[Compiled]:
    """The kernels of a call that multiply a linear's input."""
    found = [one for one in compiled if one.call.startswith(call) and one.kernel == "linear_kernel"]
    assert found, f"no {call} among {sorted({one.call for one in compiled})}"
    return iter(found)


def has(one: Compiled, *parts: str) -> bool:
    return any(all(part in name for part in parts) for name in one.multiplies)


@ON_TARGETS
def test_all_calls_compile(compiled: Compile, target: int) -> None:
    assert {one.call for one in compiled(target)} == {name for name, _ in calls.of(target)}


@ON_TARGETS
def test_tiles_are_held_in_registers(compiled: Compile, target: int) -> None:
    """Of ten kernels one at most spills, and little: which compiler spills a few values where, is not ours to say."""
    spilled = {(one.call, one.kernel): one.stack for one in compiled(target)
               if one.stack and not one.call.startswith("attention")}  # which has a test of its own
    assert max(spilled.values(), default=0) <= LITTLE and len(spilled) <= len(compiled(target)) / 10, spilled


@ON_TARGETS
def test_blocks_have_the_shared_memory_they_ask_for(compiled: Compile, target: int) -> None:
    """Also what the compiler adds, to turn a tile around, which the models of costs do not count."""
    limit = SHARED.get(divmod(target, 10), 99) * 1024
    assert {(one.call, one.kernel): one.shared for one in compiled(target) if one.shared > limit} == {}


@ON_TARGETS
def test_no_product_and_sum_are_fused_unasked(compiled: Compile, target: int) -> None:
    """Codes and scales are to have the bits of the formula, whatever Triton's default is."""
    kernels = ("linear_kernel", "expand_kernel", "quantize_act_kernel", "norm_modulate_quantize_kernel",
               "gptq_kernel")
    found = [one for one in compiled(target) if one.kernel in kernels]
    assert {one.kernel for one in found} == set(kernels)
    assert all(one.constants["enable_fp_fusion"] == "False" for one in found)


@ON_TARGETS
def test_8_bit_products_are_those_of_tensor_cores(compiled: Compile, target: int) -> None:
    """Hopper's warp groups multiply tiles of 64 channels and more; for fewer there is what came before, and on B200,
    where Triton has no other."""
    for call in ("linear_w4a8: int8 x int8", "linear_w4a8: int8 x int4", "linear_w4a4: int4 x int4"):
        for one in products(compiled(target), call):
            if target == 90 and int(one.constants["BN"]) >= 64:
                assert has(one, "wgmma.mma_async", ".s32.s8.s8"), one
            else:
                assert has(one, "mma.sync", ".s32.s8.s8.s32"), one


def test_hopper_takes_expanded_weights_from_registers(compiled: Compile) -> None:
    for name in ("int4", "nvfp4"):
        one, = products(compiled(90), f"linear_w4a8: int8 x {name}, {calls.FEW} rows")
        wgmma = sum(count for name, count in one.multiplies.items() if "wgmma" in name and "s8.s8" in name)
        assert one.constants["SUM"] == "expand" and one.from_registers == wgmma > 0


def test_rtx_50_multiplies_nvfp4(compiled: Compile) -> None:
    for one in products(compiled(120), "linear_w4a4: nvfp4 x nvfp4"):
        assert has(one, "mma.sync", "kind::mxf4nvf4.block_scale"), one


@ON_TARGETS
def test_16_bit_products_are_those_of_tensor_cores(compiled: Compile, target: int) -> None:
    for dtype, name in (("bfloat16", "bf16.bf16"), ("float16", "f16.f16")):
        for one in products(compiled(target), "linear_w4a16"):
            if one.call.endswith(f" {dtype}"):
                assert has(one, name) or has(one, "tcgen05.mma", "kind::f16"), one


@ON_TARGETS
def test_loads_are_on_their_way_while_others_are_multiplied(compiled: Compile, target: int) -> None:
    for one in products(compiled(target), f"linear_w4a8: int8 x int8, {calls.M} rows"):
        assert one.copies > 0 and one.shared > 32768
