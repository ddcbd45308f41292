"""The machine of tests/simt itself: it reports every mistake it is meant to see, and nothing else."""
from __future__ import annotations

import pytest
import torch

from tests.simt import build
from tests.simt.build import Fault, Library

FAULTS = {  # case of diagnostics.cpp → how the sentence begins, and what it says
    "global_read_past_the_end": ("out of bounds", r"reads 4 bytes at byte \d+ of in, which has 400"),
    "global_read_before_the_beginning": ("out of bounds", "reads 4 bytes at byte -4 of in"),
    "global_write_past_the_end": ("out of bounds", r"writes 4 bytes at byte \d+ of out"),
    "global_read_of_no_buffer": ("out of bounds", "reads where no buffer is"),
    "shared_write_past_the_end": ("out of bounds", r"writes 4 bytes at shared\+\d+ of 1024"),
    "shared_read_before_the_beginning": ("out of bounds", r"reads 4 bytes at shared\+-4"),
    "cp_async_past_the_end": ("out of bounds", r"reads 16 bytes at byte \d+ of in"),
    "cp_async_of_too_many_bytes": ("out of bounds", "copies 5 of 4 bytes by cp.async"),
    "global_misaligned": ("misaligned", "reads 16 bytes at byte 4 of in"),
    "shared_misaligned": ("misaligned", r"8 bytes at shared\+4"),
    "cp_async_misaligned": ("misaligned", "reads 8 bytes at byte 4 of in"),
    "store_to_an_input": ("read-only", "writes 4 bytes at byte 0 of in"),
    "read_of_what_nobody_wrote": ("poison", r"shared\+0, which nothing was written to"),
    "ldmatrix_of_what_nobody_wrote": ("poison", r"reads shared\+80, which nothing was written to"),
    "cp_async_read_before_its_wait": ("poison", "which a cp.async not waited for fills"),
    "cp_async_wait_for_one_group_too_few": ("poison", r"shared\+16, which a cp.async not waited for fills"),
    "cp_async_without_a_commit": ("poison", "which a cp.async not waited for fills"),
    "cp_async_of_another_thread_without_a_barrier": ("race", r"reads what thread 0 wrote, no barrier between"),
    "write_under_a_cp_async": ("race", "which a cp.async of thread 0 still fills"),
    "cp_async_over_what_another_warp_reads": ("race|poison", r"writes over what warp 0 read|cp.async not waited for"),
    "neighbours_value_without_syncwarp": ("race", r"reads what thread \d+ wrote"),
    "ldmatrix_without_syncwarp": ("race", r"warp 0 reads what thread \d+ wrote"),
    "syncwarp_where_syncthreads_is_needed": ("race", r"writes over what thread \d+ read"),
    "write_over_what_another_warp_reads": ("race", r"reads what thread \d+ wrote"),
    "two_threads_write_the_same": ("race", r"writes over what thread \d+ wrote"),
    "half_a_warp_at_a_shuffle": ("divergence", "0 to 15 are at __shfl_xor_sync, 16 to 31 are at its end"),
    "two_instructions_meet": ("divergence", r"is at \w+, lane \d+ at \w+"),
    "shuffle_from_outside_the_mask": ("divergence", r"takes from lane \d+, which is outside the mask"),
    "lane_outside_its_own_mask": ("divergence", r"is at __syncwarp, outside its mask"),
    "warp_that_misses_the_barrier": ("divergence", "64 to 95 are at its end"),
    "mma_of_half_a_warp": ("divergence", "is at mma_m8n8k32_s4 in a warp of fewer lanes"),
}
RACES = [name for name, (kind, _) in FAULTS.items() if kind == "race"]
POISON = [name for name, (kind, _) in FAULTS.items() if kind == "poison"]
IN = torch.arange(100, dtype=torch.int32)


def diagnose(library: Library, name: str, **mode: bool) -> torch.Tensor:
    out = torch.full((100,), -1, dtype=torch.int32)
    library.run("diagnose", name, IN, out, **mode)
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(library, name: str, order: dict) -> None:
    kind, words = FAULTS[name]
    with pytest.raises(Fault, match=rf"^({kind}): block \(0, 0, 0\) thread \(\d+, 0, 0\) .*({words})"):
        diagnose(library, name, **order)


def test_first_thread_in_either_order_is_named(library) -> None:
    for reverse, thread in ((False, 100), (True, 127)):
        with pytest.raises(Fault, match=rf"thread \({thread}, 0, 0\) reads 4 bytes at byte {thread * 4} of in"):
            diagnose(library, "global_read_past_the_end", reverse=reverse)


def test_right_synchronisation_passes(library, order: dict) -> None:
    t = torch.arange(64)
    got = diagnose(library, "right_synchronisation", **order)
    assert torch.equal(got[:64].long(), torch.where(t % 32 < 16, (t ^ 33) + (t ^ 35), t ^ 33))
    assert (got[64:] == -1).all()
    assert torch.equal(diagnose(library, "right_pipeline", **order)[:64].long(), 4 * (t ^ 63) + 0 + 1 + 2 + 3)


def test_checks_can_be_left_out(library) -> None:
    for name in RACES:
        diagnose(library, name, race=False, trap=False)
    for name in POISON:
        diagnose(library, name, trap=False, race=False)
    assert diagnose(library, "read_of_what_nobody_wrote", trap=False)[0] == -1  # bytes of 0xff


def test_impossible_launches(library) -> None:
    library.run("launch_nothing", 1024, 227 << 10)
    for threads, shared_bytes, words in ((0, 0, "a block of 0 threads"), (1025, 0, "a block of 1025 threads"),
                                         (32, (227 << 10) + 1, "232449 bytes of shared memory")):
        with pytest.raises(Fault, match=f"^launch: {words}"):
            library.run("launch_nothing", threads, shared_bytes)


def test_a_fault_leaves_nothing_behind(library) -> None:
    for name in ("half_a_warp_at_a_shuffle", "warp_that_misses_the_barrier", "ldmatrix_without_syncwarp"):
        with pytest.raises(Fault):
            diagnose(library, name)
        diagnose(library, "right_pipeline")


def test_switching_fibers_by_ucontext(order: dict) -> None:
    if reason := build.refuses():
        pytest.skip(reason)
    library = build.load("diagnostics", "-DSIMT_UCONTEXT", "-O0")
    test_right_synchronisation_passes(library, order)
    for name in ("neighbours_value_without_syncwarp", "half_a_warp_at_a_shuffle", "read_of_what_nobody_wrote"):
        test_fault_is_reported(library, name, order)
