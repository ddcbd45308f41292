import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.methods.work import Stats, Work
from tests.methods.layers import small


def test_white_statistics_are_those_of_noise_and_repeat():
    stats = Stats.white(256, gelu=False, seed=3)
    assert torch.equal(stats.tokens, Stats.white(256, gelu=False, seed=3).tokens)
    assert abs(stats.second[0] - 1) < 0.05 and abs(stats.mean[0]) < 0.05 and stats.synthetic
    assert Stats.white(256, gelu=True, seed=3).tokens.min() > -0.18


def test_chunks_cover_every_row_once():
    work, _ = small(n=9, k=160)
    work.weight = torch.empty(9, 2**18)  # four rows a chunk
    assert [(c.start, c.stop) for c in work.chunks()] == [(0, 4), (4, 8), (8, 9)]


def test_a_weight_with_nan_is_refused_by_name():
    work, _ = small()
    bad = torch.full((8, 160), float("nan"))
    with pytest.raises(NunchakuError, match="b: the weight holds NaN or Inf"):
        Work.of(["a", "b"], [torch.zeros(8, 160), bad], work.site, work.stats)


def test_statistics_of_another_width_are_refused():
    work, _ = small()
    with pytest.raises(NunchakuError, match="statistics are of 160 channels, the weight has 32"):
        Work.of(["a"], [torch.zeros(8, 32)], work.site, work.stats)
