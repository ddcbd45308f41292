"""What is freed goes back to the system, also from between small things that stay."""
import platform
from pathlib import Path

import pytest
import torch

from nunchaku_py.stream.heap import give_back


def held() -> int:
    """Bytes of this process's own."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked for it")
def test_freed_tensors_between_kept_ones_are_given_back() -> None:
    torch.ones(6_000_000)  # once freed, glibc takes smaller ones from the heap instead of mapping each
    before, kept, freed = held(), [], []
    for _ in range(300):
        freed.append(torch.ones(250_000))
        kept.append(torch.ones(2_000))
    assert held() - before > 250e6
    del freed
    give_back()
    assert held() - before < 50e6 and len(kept) == 300
