"""What the machine reports of mbarriers, named barriers, TMA and wgmma, and that it reports nothing else."""
from __future__ import annotations

import pytest
import torch

from tests.simt.build import Fault, Library

FAULTS = {  # case of hopper_cases.cpp → how the sentence begins, and what it says
    "mbarrier_without_init": ("misuse", r"uses an mbarrier at shared\+16384, where none was initialised"),
    "mbarrier_written_over": ("misuse", "or it was overwritten"),
    "mbarrier_of_another_thread_without_a_barrier": ("race|misuse", "uses what thread 0 wrote|none was initialised"),
    "mbarrier_of_another_block_without_cluster_sync": ("race|misuse", "uses what thread 0 wrote|none was initialised"),
    "mbarrier_misaligned": ("misaligned", r"8 bytes at shared\+4"),
    "mbarrier_for_nobody": ("misuse", "initialises an mbarrier for 0 arrivals"),
    "mbarrier_that_nobody_arrives_at": ("divergence", r"0 to 3 are at an mbarrier, for parity 0, at shared\+16384, "
                                        "phase 0, 2 of 3 arrivals and 40 bytes to come, 4 to 31 are at its end"),
    "mbarrier_arrivals_beyond_its_count": ("misuse", "where all 1 have arrived, in phase 0: 16 bytes are to come"),
    "mbarrier_waited_for_too_late": ("divergence", "for parity 0, .* phase 2, 1 of 1 arrivals"),
    "arrival_in_no_block_of_the_cluster": ("out of bounds", "turns to block 2 of a cluster of 2"),
    "arrival_in_a_block_that_may_have_ended": ("lifetime", "which has ended|nothing made it wait for what thread 0"),
    "arrival_without_init_done": ("misuse", "arrives at an mbarrier of block . without a mbarrier_init_done there"),
    "named_barrier_zero": ("misuse", "is at named barrier 0; there are 1 to 15"),
    "named_barrier_of_half_warps": ("divergence", "is at named barrier 1 with only some lanes of the warp of thread"),
    "named_barrier_of_two_sizes": ("divergence", r"is at named barrier 1 for \d+ threads, where others are for"),
    "named_barrier_of_others": ("race|poison", "reads what thread|which nothing was written to"),
    "ldmatrix_without_syncwarp_after_a_named_barrier": ("race", r"warp 0 reads what thread \d+ wrote"),
    "fewer_registers_than_fewer": ("misuse", "has 40 registers, and asks for fewer: 48"),
    "tma_read_before_its_wait": ("race|poison", "reads what TMA wrote|a TMA load not waited for|nothing was written"),
    "tma_read_by_one_who_has_not_waited": ("race|poison", "reads what TMA wrote|not waited for|nothing was written"),
    "tma_twice_to_one_place": ("race", "which a TMA load still fills|TMA writes over what TMA wrote"),
    "tma_over_what_was_stored_without_fence_async": ("race", r"TMA writes over what thread \d+ wrote, no fence_async"),
    "tma_over_what_lanes_read_without_syncwarp": ("race", r"TMA writes over what thread \d+ read, no barrier"),
    "tma_misaligned": ("misaligned", r"loads by TMA to shared\+64"),
    "tma_past_the_end_of_shared_memory": ("out of bounds", r"writes 8192 bytes at shared\+16512 of 24576"),
    "tma_of_a_matrix_larger_than_its_buffer": ("out of bounds", "reads 128 bytes at byte 25600 of matrix"),
    "tma_that_nobody_waits_for": ("lifetime", "which has ended|nothing made it wait for what TMA of block 0 does"),
    "tma_to_a_block_that_does_not_wait": ("lifetime", "block 1 of its cluster, which has ended|nothing made it wait"),
    "wgmma_of_fewer_threads": ("divergence", "is at wgmma_fence in a warpgroup of fewer threads"),
    "wgmma_and_wgmma_wait_meet": ("divergence", r"is at wgmma_\w+, thread \d+ at wgmma_"),
    "wgmma_of_different_tiles": ("divergence", "is at a wgmma of other operands than thread 0"),
    "wgmma_of_what_was_stored_without_fence_async": ("race", r"reads what thread \d+ wrote, no fence_async between"),
    "wgmma_of_what_was_stored_after_fence_async": ("race", r"reads what thread \d+ wrote, no fence_async between"),
    "wgmma_of_what_was_stored_without_a_barrier": ("race", r"reads what thread \d+ wrote, no barrier between"),
    "wgmma_of_what_nobody_wrote": ("poison", "which nothing was written to"),
    "store_over_what_wgmma_reads": ("race", "writes over what wgmma of warpgroup 0 read"),
    "wgmma_without_another_fence": ("misuse", "without a wgmma_fence after its sums were touched"),
    "wgmma_of_a_tile_between_two": ("misuse", "which does not begin in the first row of 1024 bytes"),
    "wgmma_never_waited_for": ("lifetime", "ends while wgmma of its warpgroup go on"),
}
MATRIX = torch.arange(100 * 256).to(torch.uint8)


def run_case(library: Library, name: str, **mode: bool) -> torch.Tensor:
    out = torch.full((100,), -1, dtype=torch.int32)
    library.run("run_case", name, MATRIX, out, **mode)
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(library, name: str, order: dict, timing: dict) -> None:
    kind, words = FAULTS[name]
    with pytest.raises(Fault, match=rf"^({kind}): block \(\d, 0, 0\) thread \(\d+, 0, 0\) .*({words})"):
        run_case(library, name, **order, **timing)


def test_right_order_passes(library, order: dict, timing: dict) -> None:
    t = torch.arange(100)
    assert torch.equal(run_case(library, "right_named_barriers", **order, **timing).long(), t ^ 96)
    words = MATRIX.view(torch.int32).view(100, 64).long()
    read = sum(words[row, t // 64 + word] for row in range(5) for word in range(8))
    got = run_case(library, "right_reads_of_stages", **order, **timing).long()
    assert torch.equal(got[32:96], read[32:96].int().long())
    product = 2 * (1 + 4 + 9 + 16)
    assert set(run_case(library, "right_order_of_stores_tma_and_wgmma", **order, **timing).tolist()) == {product * 1001}
    assert run_case(library, "right_ends_of_threads", **order, **timing)[:3].tolist() == [2, 2, -1]


def test_a_fault_leaves_nothing_behind(library) -> None:
    for name in ("tma_that_nobody_waits_for", "mbarrier_that_nobody_arrives_at", "store_over_what_wgmma_reads"):
        with pytest.raises(Fault):
            run_case(library, name)
        run_case(library, "right_order_of_stores_tma_and_wgmma")
