"""The bars of quantization quality, on synthetic layers and held-out tokens. Run with -s to see the table."""
import pytest

from benchmarks.quality import layer_table
from benchmarks.quality.layer_table import RANKS, SEEDS, Row, pick

SIZE = 768


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    measured = layer_table.measure(SIZE)
    print("\n" + layer_table.markdown(measured))
    return measured


def a4(rows: list[Row], method: str, fmt: str = "int4", site: str = "linear", **more: object) -> list[float]:
    found = pick(rows, method=method, format=fmt, site=site, mode="a4", **more)
    assert len(found) == len(SEEDS)
    return found


@pytest.mark.parametrize("site", ["linear", "post-GELU"])
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_every_step_helps_on_every_seed(rows, fmt, site):
    ladder = [a4(rows, name, fmt, site) for name in ("RTN", "+ smoothing", "+ rank 32", "+ GPTQ")]
    for before, after in zip(ladder, ladder[1:], strict=False):
        assert all(b > a for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_scale_search_and_refit_do_no_harm(rows, fmt):
    for earlier, later in (("+ rank 32", "+ scale search"), ("+ GPTQ", "+ refit")):
        assert all(b <= a * 1.005 for a, b in zip(a4(rows, earlier, fmt), a4(rows, later, fmt), strict=True))


def test_svdquant_int4_is_well_below_round_to_nearest(rows):
    pairs = zip(a4(rows, "SVDQuant", rank=32), a4(rows, "RTN"), strict=True)
    assert all(svdquant <= 0.6 * rtn for svdquant, rtn in pairs)


def test_more_rank_is_better(rows):
    by_rank = [a4(rows, "SVDQuant", rank=rank) for rank in RANKS]
    for less, more in zip(by_rank, by_rank[1:], strict=False):
        assert all(b < a for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize("site", ["linear", "post-GELU"])
@pytest.mark.parametrize("method", ["RTN", "SVDQuant"])
def test_nvfp4_is_no_worse_than_int4(rows, method, site):
    rank = 32 if method == "SVDQuant" else 0
    pairs = zip(a4(rows, method, "nvfp4", site, rank=rank), a4(rows, method, "int4", site, rank=rank), strict=True)
    assert all(nvfp4 <= int4 for nvfp4, int4 in pairs)


def in_mode(rows: list[Row], mode: str, fmt: str, site: str) -> list[float]:
    return pick(rows, method="SVDQuant", format=fmt, site=site, mode=mode, rank=32)


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("site, bar", [("linear", 0.75), ("post-GELU", 0.95)])
def test_a8_is_closer_than_a4(rows, site, bar, fmt):
    pairs = zip(in_mode(rows, "a8", fmt, site), in_mode(rows, "a4", fmt, site), strict=True)
    assert all(a8 <= bar * a4 for a8, a4 in pairs)


MISSED = pytest.mark.xfail(strict=True, reason="measured 1.06 (1.11 at 3072): beside NVFP4's small error INT8 shows")


@pytest.mark.parametrize("fmt", ["int4", pytest.param("nvfp4", marks=MISSED)])
@pytest.mark.parametrize("site", ["linear", "post-GELU"])
def test_a8_is_nearly_a16(rows, site, fmt):
    pairs = zip(in_mode(rows, "a8", fmt, site), in_mode(rows, "a16", fmt, site), strict=True)
    assert all(a8 <= 1.05 * a16 for a8, a16 in pairs)
