import dataclasses

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.methods.error import noise_of, rounded
from nunchaku_py.methods.lowrank import lowrank
from nunchaku_py.methods.work import Options, round16
from tests.methods.layers import CTX, small


def cost(work):
    remainder = work.remainder(slice(None))
    return noise_of(work, CTX).cost(rounded(remainder, work, CTX) - remainder, remainder).item()


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_alternation_beats_one_svd(fmt):
    once, many = small(fmt)[0], small(fmt)[0]
    lowrank(once, dataclasses.replace(CTX, options=Options(rounds=1)))
    lowrank(many, CTX)
    assert cost(many) < cost(once) < cost(small(fmt, rank=0)[0])


def test_pair_holds_16_bit_values_and_repeats():
    work, again = small()[0], small()[0]
    for one in (work, again):
        one.smooth = round16(torch.linspace(0.3, 3.0, 160), torch.bfloat16)
        lowrank(one, CTX)
    down = (work.low / work.smooth).bfloat16()
    assert torch.equal(work.up, work.up.bfloat16().float()) and torch.equal(down.float() * work.smooth, work.low)
    assert torch.equal(work.up, again.up) and torch.equal(work.low, again.low)


def test_rank_zero_and_full_rank_and_more():
    none, full, over = (small(rank=rank, n=24)[0] for rank in (0, 24, 25))
    lowrank(none, CTX)
    assert none.up.shape == (24, 0)
    lowrank(full, CTX)
    assert (full.weight - full.up @ full.low).norm() < 0.02 * full.weight.norm()
    with pytest.raises(NunchakuError, match="rank 25 is more than a weight of"):
        lowrank(over, CTX)
