"""Adapters in the low-rank branch: what they add, how sites share them, and what is written when."""
from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from nunchaku_py.linear import QuantLinear
from nunchaku_py.lora.branch import Adapter, InputGroup, at_once, fold, rescale
from nunchaku_py.lora.keep import keep
from nunchaku_py.ops.registry import backend
from nunchaku_py.split_linear import SplitLinear
from tests.lora.toys import normal
from tests.test_linear import K, N, R, linear, site, tensors

KINDS = [("int4", "w4a4"), ("nvfp4", "w4a4"), ("int4", "w4a16"), ("uint4", "w4a16")]
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the largest error of rounding 1 + …
ROWS = 67


def half(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def adapter(n: int, k: int, rank: int, seed: int, scale: float) -> Adapter:
    return Adapter(half(normal(rank, k, seed=seed, size=0.3)), half(normal(n, rank, seed=seed + 1, size=0.3)), scale)


def give(module: QuantLinear, *adapters: Adapter) -> None:
    module.adapters = adapters
    fold(module)


@torch.no_grad()
def added(x: Tensor, *adapters: Adapter) -> tuple[Tensor, Tensor]:
    """(what they add, the same with every term positive), in fp64."""
    total, terms = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one in adapters:
        down, up = one.down.weight.double(), one.up.weight.double()
        total = total + one.scale * (x.double() @ down.T) @ up.T
        terms = terms + abs(one.scale) * (x.double().abs() @ down.abs().T) @ up.abs().T
    return total, terms


def assert_added(before: Tensor, after: Tensor, x: Tensor, *adapters: Adapter, stored: float = 2**-8) -> None:
    """Rounding: of scale·up when it is stored in 16 bit; of h, which some kernels round to the type of the rows; of the
    two outputs; and of fp32 sums."""
    expected, terms = added(x, *adapters)
    unit = UNIT[x.dtype]
    bound = (stored + unit) * 1.01 * terms + 1.01 * unit * (before.abs() + after.abs()).double() + 2**-18 * terms
    bound += 2**-16 * before.abs().max()
    error = (after.double() - before.double() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert terms.max() > 4 * bound.median(), "this bound would let anything pass"


@pytest.mark.parametrize(("format", "kind"), KINDS)
@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_what_an_adapter_adds(format: str, kind: str, name: str, dtype: torch.dtype) -> None:
    for mode in ("a4", "a8", "a16") if kind == "w4a4" else ("a16",):
        with backend(name), torch.no_grad():
            module = linear(site(format, kind, 4 if kind == "w4a4" else 0), mode, dtype)
            x = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(1)).to(dtype)
            before, one = module(x), adapter(N, K, 5, 3, 0.75)
            give(module, one)
            assert_added(before, module(x), x, one)
            give(module)
            assert torch.equal(module(x), before)


@pytest.mark.parametrize("seed", range(12))
def test_fuzzed(seed: int) -> None:
    """Any number of adapters, of any ranks and strengths, on sites of any size, rank and format."""
    chance = random.Random(seed)
    format, kind = chance.choice(KINDS)
    n, k = chance.randint(1, 90), chance.randint(1, 150)
    rank = chance.randint(0, min(n, k, 9)) if kind == "w4a4" else 0
    module = linear(site(format, kind, rank), chance.choice(("a4", "a8", "a16")) if kind == "w4a4" else "a16",
                    torch.bfloat16, n=n, k=k, bias=chance.random() < 0.5)
    x = normal(chance.choice((1, 2, 63, 65)), k, seed=seed, size=1.0)
    with torch.no_grad():
        before = module(x)
        adapters = [adapter(n, k, chance.randint(1, 40), 10 * i, chance.uniform(-2, 2))
                    for i in range(chance.randint(1, 4))]
        give(module, *adapters)
        assert_added(before, module(x), x, *adapters)
        adapters = [one._replace(scale=chance.uniform(-2, 2)) for one in adapters]
        module.adapters = tuple(adapters)
        rescale(module)
        assert_added(before, module(x), x, *adapters)


def test_a_linear_in_parts_takes_an_adapter_in_parts() -> None:
    sites = [site("int4"), site("int4", shifted=True)]
    module = SplitLinear(sites, [(0, 32), (32, K)], N, True, torch.bfloat16)
    for part, the in zip(module.parts, sites, strict=True):
        made = tensors(the, N, part.in_features, bias=False)
        part.set_tensors(made)
    module.set_tensor("bias", torch.randn(N))
    x, one = normal(ROWS, K, seed=5, size=0.5).float(), adapter(N, K, 6, 3, 0.75)
    with torch.no_grad():
        before = module(x)
        for part, (first, last) in zip(module.parts, module.ranges, strict=True):
            give(part, one._replace(first=first, last=last))
        assert_added(before, module(x), x, one)


# ----------------------------------------------------------------------------------------------------- shared inputs
def group(count: int = 3, format: str = "int4", mode: str = "a8") -> list[QuantLinear]:
    """Sites as they are quantized together: one smooth, one down."""
    sites = [linear(site(format), mode, torch.bfloat16, n=N + 8 * i, seed=i) for i in range(count)]
    for other in sites[1:]:
        other.set_tensor("smooth", sites[0].smooth.data)
        other.set_tensor("down", sites[0].down.data)
        other.set_mode(mode)
    InputGroup.of(sites)
    return sites


@pytest.mark.parametrize("ranks", [(4, 0, 0), (0, 7, 0), (3, 5, 0), (16, 4, 9), (0, 0, 0)])
@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
@torch.no_grad()
def test_sites_that_share_an_input_share_it_with_adapters(ranks: tuple[int, ...], mode: str) -> None:
    sites = group(mode=mode)
    x = normal(ROWS, K, seed=9, size=1.0)
    before = [one(x) for one in sites]
    held = [[adapter(one.rows_out, K, rank, 20 + 2 * i, 0.5)] if rank else [] for i, (one, rank) in
            enumerate(zip(sites, ranks, strict=True))]
    for one, adapters in zip(sites, held, strict=True):
        give(one, *adapters)
    assert len({one.input_key for one in sites}) == 1
    quantized = sites[1].quantize_input(x)
    assert quantized.h.shape[1] == sites[0].site.rank + sum(ranks)
    for one, adapters, y in zip(sites, held, before, strict=True):
        after = one.multiply(quantized, x.dtype)
        assert torch.equal(after, one(x))
        if adapters:
            assert_added(y, after, x, *adapters)
        else:
            assert torch.equal(after, y)


@torch.no_grad()
def test_equal_downs_are_held_once() -> None:
    """As of a LoRA trained on one fused q/k/v, from which diffusers' converters make three with one A."""
    sites = group()
    down = normal(8, K, seed=3, size=0.3)
    for i, one in enumerate(sites):
        give(one, Adapter(half(down.clone()), half(normal(one.rows_out, 8, seed=4 + i)), 1.0))
    assert sites[0].adapter_down.shape[0] == sites[0].site.rank + 8
    x = normal(ROWS, K, seed=9, size=1.0)
    quantized = sites[0].quantize_input(x)
    for one in sites:
        assert torch.equal(one.multiply(quantized, x.dtype), one(x))


def test_sites_with_other_inputs_keep_theirs() -> None:
    sites = group()
    sites[1].set_tensor("smooth", sites[1].smooth.data * 2)
    with torch.no_grad():
        give(sites[0], adapter(N, K, 4, 3, 1.0))
    assert sites[2].adapter_down is not None and sites[1].adapter_down is None


@torch.no_grad()
def test_compressed_to_fewer_ranks() -> None:
    """Two adapters whose product is of fewer ranks than they have; one that would lose too much stays as it is."""
    module = linear(site(), "a8", torch.bfloat16)
    x, one = normal(ROWS, K, seed=9, size=1.0), adapter(N, K, 4, 3, 0.5)
    twice = (one, one._replace(scale=0.25))
    before = module(x)
    module.adapter_room = module.adapter_room._replace(most=4, tolerance=1e-3)
    give(module, *twice)
    assert module.adapter_up.shape[1] == R + 4
    assert_added(before, module(x), x, *twice, stored=2 * 2**-8)  # both factors are rounded
    module.adapters = (one, one._replace(scale=-0.25))
    rescale(module)
    assert_added(before, module(x), x, *module.adapters, stored=2 * 2**-8)
    give(module, one, adapter(N, K, 4, 30, 1.0))
    assert module.adapter_up.shape[1] == R + 8


# ------------------------------------------------------------------------------------------------- what is written when
@torch.no_grad()
def test_a_strength_is_written_in_place() -> None:
    module, one = linear(site(), "a8", torch.bfloat16), adapter(N, K, 4, 3, 1.0)
    give(module, one)
    places = module.adapter_down.data_ptr(), module.adapter_up.data_ptr()
    x = normal(ROWS, K, seed=9, size=1.0)
    at_one = module(x)
    module.adapters = (one._replace(scale=0.25),)
    rescale(module)
    assert not torch.equal(module(x), at_one)
    give(module, one)
    assert torch.equal(module(x), at_one)
    assert places == (module.adapter_down.data_ptr(), module.adapter_up.data_ptr())


@torch.no_grad()
def test_at_once_writes_at_its_end_also_where_something_goes_wrong() -> None:
    module, one = linear(site(), "a8", torch.bfloat16), adapter(N, K, 4, 3, 1.0)
    with pytest.raises(RuntimeError, match="in the middle"), at_once():
        with at_once():
            give(module, one)
        assert module.adapter_down is None
        raise RuntimeError("in the middle")
    assert module.adapter_down is not None


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
@torch.no_grad()
def test_kept_adapters_are_rank_of_their_own(mode: str) -> None:
    sites = group(mode=mode)
    x = normal(ROWS, K, seed=9, size=1.0)
    for i, one in enumerate(sites[:2]):
        give(one, adapter(one.rows_out, K, 3 + i, 20 + 2 * i, 0.5))
    before = [one(x) for one in sites]
    keep(sites[:2])
    assert [one.site.rank for one in sites] == [4 + 3 + 4] * 3
    assert all(one.adapter_down is None and one.state_dict()["down"].shape == (11, K) for one in sites)
    assert len({one.ensure_packed() or one.input_key for one in sites}) == 1
    for one, y in zip(sites, before, strict=True):
        assert (one(x).float() - y.float()).abs().max() <= 2**-7 * y.abs().max()  # zero columns: other sums
