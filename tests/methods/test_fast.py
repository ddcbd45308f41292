"""The native inner loops against the torch code of the steps."""
import pytest
import torch

from nunchaku_py import native, ops
from nunchaku_py.methods import fast
from nunchaku_py.methods.error import noise_of, rounding_of
from nunchaku_py.methods.fit import fit
from nunchaku_py.methods.gptq import Grid, gptq, ordered_factor, sweep
from tests.methods.layers import CTX, small

pytestmark = pytest.mark.skipif(native.module is None, reason="no native module")
FORMATS = pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
EPSILON = 2.0**-24  # of one rounding in fp32


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", [(50, 160), (9, 43), (3, 1000), (96, 64), (1, 1)])
def test_rounded_rows_have_the_bits_of_the_reference(fmt, dtype, n, k):
    work, _ = small(fmt, n=max(n, 3), k=k, rank=0)
    g = torch.Generator().manual_seed(1)
    work.weight, work.up = work.weight[:n].to(dtype), torch.randn(n, 1, generator=g) * 0.1
    work.low, work.smooth = torch.randn(1, k, generator=g) * 0.1, torch.rand(k, generator=g) + 0.5
    noise, rows = noise_of(work, CTX), slice(0, n)
    found, cost = rounding_of(work, CTX, rows, noise)
    assert fast.rounds_rows(found, work.weight, work.site.weight_format)
    with ops.backend("torch"):
        expected, exact = rounding_of(work, CTX, rows, noise)
    assert torch.equal(found, expected)
    assert cost.item() == pytest.approx(exact.item(), rel=2 * k * EPSILON)  # sums of k terms, all positive


def test_a_zero_row_and_a_row_beyond_fp16_scales():
    work, _ = small(n=6, k=64, rank=0)
    work.weight = torch.stack([torch.zeros(64), torch.full((64,), 3e38), *work.weight[:4]])
    noise = noise_of(work, CTX)._replace(signal=torch.zeros(64), rounding=torch.zeros(64))
    context = type(CTX)(scale_dtype=torch.float16)
    remainder = work.remainder(slice(0, 6))
    fast.round_rows(remainder, work.weight, work.smooth, *noise, work.site.weight_format, torch.float16)
    with ops.backend("torch"):
        assert torch.equal(remainder, rounding_of(work, context, slice(0, 6), noise)[0])


@FORMATS
def test_columns_that_nothing_couples_have_the_bits_of_the_reference(fmt):
    work, _ = small(fmt, rank=0, n=77, k=150)
    fit(work, CTX)
    order, upper = torch.arange(150), torch.diag(torch.rand(150, generator=torch.Generator().manual_seed(0)) + 0.5)
    found = []
    for name in ("cpu", "torch"):
        columns = work.weight.T.contiguous()
        errors = torch.empty_like(columns)
        with ops.backend(name):
            sweep(columns, errors, Grid.of(work.residual, order), upper, 0)
        found.append((columns, errors))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@FORMATS
@pytest.mark.parametrize("k", [43, 128, 300])
def test_a_row_leaves_the_exact_one_only_at_a_tie(fmt, k):
    """fp32 sums differ from fp64 ones by at most EPSILON per term of Σ|U_ji·e_j| and per product, so a code may differ
    first only where the exact value lies that close to the middle between two; after it the rows are strangers."""
    work, _ = small(fmt, rank=0, n=70, k=k)
    fit(work, CTX)
    order, upper = ordered_factor(work, CTX)
    grid = Grid.of(work.residual, order)
    columns = work.weight.T[order].contiguous()
    found = columns.clone()
    sweep(found, torch.empty_like(found), grid, upper, 0)
    exact, size, alive = columns.double(), columns.abs().double(), torch.ones(70, dtype=torch.bool)
    met = 0
    for j in range(k):
        group = int(grid.group[j])
        step = grid.step[group].double()
        slack = (k + 4) * EPSILON * size[j] / step.clamp_min(1e-30) + 8 * EPSILON
        near = [grid.round((exact[j] + way * slack * step).float(), group) for way in (-1, 0, 1)]
        agrees = found[j] == near[1]
        assert (agrees | (found[j] == near[0]) | (found[j] == near[2]))[alive].all()
        alive &= agrees
        met += int(alive.sum())
        e = (exact[j] - near[1].double()) / upper[j, j].double()
        exact[j + 1:] -= upper[j, j + 1:].double()[:, None] * e
        size[j + 1:] += upper[j, j + 1:].double().abs()[:, None] * e.abs()
    assert met > 0.9 * 70 * k  # ties are rare: it is the exact algorithm


@FORMATS
def test_threads_and_pieces_do_not_show(fmt):
    """Rows are independent: alone, in other pieces, on other threads they get the same bits."""
    work, _ = small(fmt, rank=0, n=75, k=160)
    fit(work, CTX)
    order, upper = ordered_factor(work, CTX)
    grid, columns = Grid.of(work.residual, order), work.weight.T[order].contiguous()[:100]
    whole, threads = columns.clone(), torch.get_num_threads()
    fast.sweep(whole, torch.empty_like(whole), upper[:100, :100], grid.step, grid.inverse, grid.group[:100],
               grid.format)
    try:
        torch.set_num_threads(3)
        part = columns[:, 5:42].contiguous()
        step, inverse = (t[:, 5:42].contiguous() for t in (grid.step, grid.inverse))
        fast.sweep(part, torch.empty_like(part), upper[:100, :100], step, inverse, grid.group[:100], grid.format)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(part, whole[:, 5:42])


def test_more_columns_than_a_call_takes_are_refused():
    with pytest.raises(ValueError, match="sweep: too many columns"):
        native.module.sweep(1, native.module.sweep_columns + 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1)


def test_the_reference_runs_where_it_is_asked_for():
    with ops.backend("torch"):
        assert fast.sweep_columns(torch.zeros(1)) == 0
        work, held_out = small(rank=0)
        gptq(work, CTX)
    codes = work.residual.codes
    again, _ = small(rank=0)
    gptq(again, CTX)
    same = (codes == again.residual.codes).float().mean().item()
    assert same > 0.9
