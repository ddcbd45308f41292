"""A right GEMM of TMA, mbarriers and wgmma passes, and each of its planted mistakes is caught."""
from __future__ import annotations

import pytest
import torch

from tests.simt.build import Call, Fault, Library

BUGS = {  # planted in hopper_pipeline.cuh → the fault that gives it away
    "reads_before_full": "race|poison",
    "refills_before_empty": "race|misuse",
    "empty_of_own_block_only": "race",
    "gives_back_the_stage_in_use": "race",
    "wrong_parity_of_full": "race|poison|divergence",
    "wrong_parity_of_empty": "divergence",
    "expects_too_many_bytes": "divergence",
    "expects_too_few_bytes": "misuse",
    "one_arrival_too_many": "race|misuse|divergence",
    "one_arrival_too_few": "divergence",
    "leaves_the_cluster_early": "lifetime",
    "no_mbarrier_init_done": "misuse",
    "no_cluster_sync_after_init": "race|misuse",
    "no_wgmma_fence": "misuse",
    "no_wgmma_wait": "race",
    "touches_sums_of_wgmma": "misuse",
    "next_k_without_shift": "misuse",
    "no_named_barrier": "race|poison",
    "staging_over_a_stage": "race",
    "named_barrier_of_too_many": "divergence",
    "more_registers_than_there_are": "divergence",
}
OF_CLUSTERS = {"empty_of_own_block_only", "no_cluster_sync_after_init", "leaves_the_cluster_early"}


class Problem:
    def __init__(self, m: int, n: int, k: int) -> None:
        torch.manual_seed(m + n + k)
        self.sizes = (m, n, k)
        self.a, self.b = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((m, k), (n, k)))
        self.want = self.a.int() @ self.b.int().T

    def run(self, library: Library, bug: str = "none", cluster: int = 2, **mode: bool | int) -> tuple[bool, Call]:
        y = torch.full(self.want.shape, -1, dtype=torch.int32)
        call = library.run("pipeline", bug, self.a, self.b, y, *self.sizes, cluster, **mode)
        return torch.equal(y, self.want), call


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("sizes", ((1, 1, 16), (128, 64, 128), (300, 200, 400), (520, 70, 144)))
def test_right_kernel_is_right(library, sizes: tuple[int, int, int], cluster: int, order: dict, timing: dict) -> None:
    assert Problem(*sizes).run(library, cluster=cluster, **order, **timing)[0]


def test_same_result_without_checks_and_with_more_workers(library) -> None:
    problem = Problem(300, 200, 400)
    for mode in ({"workers": 2}, {"race": False}, {"race": False, "trap": False}, {"trap": False}):
        right, call = problem.run(library, **mode)
        assert right and call.switches > 0, mode


@pytest.mark.parametrize("cluster", (1, 2))
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(library, bug: str, cluster: int, order: dict, timing: dict) -> None:
    problem = Problem(300, 200, 400)
    if cluster == 1 and bug in OF_CLUSTERS:
        assert problem.run(library, bug, cluster, **order, **timing)[0]
    else:
        with pytest.raises(Fault, match=f"^({BUGS[bug]}): "):
            problem.run(library, bug, cluster, **order, **timing)


def test_who_waits_for_ever_is_told(library) -> None:
    with pytest.raises(Fault, match=r"in block 0 of the cluster 0 to 0 are at an mbarrier, for parity 0, at "
                                    r"shared\+\d+, phase 0, 4 of 4 arrivals and 0 bytes to come, .*; in block 1 of .*"
                                    r"128 to 383 are at .*, phase 0, 0 of 1 arrivals and 16 bytes to come"):
        Problem(300, 200, 400).run(library, "expects_too_many_bytes")


@pytest.mark.parametrize("bug", ("reads_before_full", "no_named_barrier", "staging_over_a_stage"))
def test_result_alone_gives_it_away(library, bug: str) -> None:
    """With the shadow of shared memory switched off."""
    try:
        assert not Problem(300, 200, 400).run(library, bug, race=False, trap=False)[0]
    except Fault as fault:
        assert str(fault).startswith("misuse: ")
