import pytest
import torch
from torch import nn

from nunchaku_py import collect
from nunchaku_py.collect import Collector, SiteTap, tapped
from nunchaku_py.errors import NunchakuError


def collected(module, inputs, sample=512, **tap):
    collector = Collector("blocks.0.proj", SiteTap(module, **tap), len(inputs), sample)
    with torch.no_grad(), tapped([collector]):
        for x in inputs:
            module(x)
    return collector.stats()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 37, 24, generator=generator) + 0.5 for _ in range(3)]


def check(stats, x):
    assert torch.equal(stats.absmax, x.abs().amax(0))
    torch.testing.assert_close(stats.mean, x.mean(0))
    torch.testing.assert_close(stats.second, x.square().mean(0))
    assert stats.rows == len(x) and not stats.synthetic


def test_statistics_of_a_linear(inputs):
    x = torch.cat(inputs).reshape(-1, 24)
    stats = collected(nn.Linear(24, 8), inputs, gram=True)
    check(stats, x)
    torch.testing.assert_close(stats.gram, x.T @ x / len(x))
    assert stats.tokens.shape == (222, 24)  # fewer rows than asked for: all of them, each once
    assert torch.equal(stats.tokens, x)


def test_chunks_do_not_change_the_statistics(inputs, monkeypatch):
    monkeypatch.setattr(collect, "CHUNK_ELEMENTS", 24 * 5)
    x = torch.cat(inputs).reshape(-1, 24)
    stats = collected(nn.Linear(24, 8), inputs, gram=True)
    check(stats, x)
    torch.testing.assert_close(stats.gram, x.T @ x / len(x))


def test_column_range(inputs):
    x = torch.cat(inputs).reshape(-1, 24)[:, 8:20]
    stats = collected(nn.Linear(24, 8), inputs, columns=(8, 20), gram=True)
    check(stats, x)
    assert stats.gram.shape == (12, 12) and stats.tokens.shape[1] == 12


def test_columns_outside_the_input_are_refused(inputs):
    with pytest.raises(NunchakuError, match="blocks.0.proj: columns 8:32 do not lie within an input of 24"):
        collected(nn.Linear(24, 8), inputs, columns=(8, 32))


def test_rows_of_a_convolution_are_pixels():
    x = torch.randn(2, 24, 3, 5, generator=torch.Generator().manual_seed(0))
    check(collected(nn.Conv2d(24, 8, 1), [x]), x.permute(0, 2, 3, 1).reshape(-1, 24))


def test_16_bit_inputs_are_summed_in_fp32():
    x = torch.full((4096, 16), 1.0078125, dtype=torch.bfloat16)
    stats = collected(nn.Linear(16, 4).bfloat16(), [x], gram=True)
    assert torch.equal(stats.mean, torch.full((16,), 1.0078125))
    assert torch.equal(stats.gram, torch.full((16, 16), 1.0078125**2))
    assert stats.tokens.dtype == torch.bfloat16


def test_the_sample_is_even_over_calls_and_rows(inputs):
    rows = [torch.arange(100.0).repeat(4, 1).T + 1000 * call for call in range(3)]
    tokens = collected(nn.Linear(4, 4), rows, sample=30).tokens[:, 0]
    assert len(tokens) == 30
    for call in range(3):
        own = tokens[10 * call : 10 * call + 10] - 1000 * call
        assert torch.equal((own // 10).long(), torch.arange(10))  # one from each tenth


def test_more_calls_than_sampled_rows():
    rows = [torch.full((5, 4), float(call)) for call in range(40)]
    tokens = collected(nn.Linear(4, 4), rows, sample=8).tokens[:, 0]
    assert torch.equal(tokens, torch.arange(8) * 5.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_name_the_site(inputs, bad):
    inputs[1][0, 3, 7] = bad
    with pytest.raises(NunchakuError, match="blocks.0.proj: .*NaN or Inf in 1 of its 24 channels"):
        collected(nn.Linear(24, 8), inputs)


def test_the_hooks_are_gone_afterwards(inputs):
    linear = nn.Linear(24, 8)
    collected(linear, inputs)
    assert not linear._forward_pre_hooks


def test_an_input_given_by_name_is_seen():
    linear, x = nn.Linear(24, 8), torch.ones(3, 24)
    collector = Collector("proj", SiteTap(linear), 1, 8)
    with tapped([collector]):
        linear(input=x)
    assert collector.stats().rows == 3
