"""Every instruction that csrc/cuda/common wraps, against its description in the PTX ISA."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.simt import fragments
from tests.simt.fragments import DECODE, Shape, registers, spread

MMA = {  # instruction: shape, formats of A and B
    "mma_m8n8k32_s4": (fragments.M8N8K32_4BIT, "s4", "s4"),
    "mma_m8n8k32_u4s4": (fragments.M8N8K32_4BIT, "u4", "s4"),
    "mma_m16n8k64_s4": (fragments.M16N8K64_4BIT, "s4", "s4"),
    "mma_m16n8k64_u4s4": (fragments.M16N8K64_4BIT, "u4", "s4"),
    "mma_m8n8k16_s8": (fragments.M8N8K16_8BIT, "s8", "s8"),
    "mma_m16n8k32_s8": (fragments.M16N8K32_8BIT, "s8", "s8"),
    "mma_m16n8k8_f16": (fragments.M16N8K8_16BIT, "f16", "f16"),
    "mma_m16n8k16_f16": (fragments.M16N8K16_16BIT, "f16", "f16"),
    "mma_m16n8k16_bf16": (fragments.M16N8K16_16BIT, "bf16", "bf16"),
}
WITH_START = [name for name in MMA if "4" in name.rpartition("_")[2]]
MAGIC = 0x4B400000  # read as a float: 1.5·2²³


def float_codes(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(torch.int16).long() & 0xFFFF


def random_codes(fmt: str, *shape: int) -> Tensor:
    """Any bits of an integer or e2m1; small whole numbers of a float format, so that sums are exact."""
    if fmt in ("bf16", "f16"):
        return float_codes(torch.randint(-50, 51, shape), DECODED[fmt])
    return torch.randint(0, 256 if fmt == "s8" else 16, shape)


DECODED = {"bf16": torch.bfloat16, "f16": torch.float16}


def sum_type(fmt: str) -> torch.dtype:
    return torch.int32 if fmt in ("s4", "u4", "s8") else torch.float32


def run_mma(library, name: str, shape: Shape, a: Tensor, b: Tensor, c: Tensor, start: int = 0, **mode: bool) -> Tensor:
    """C as fragments, after the instruction was executed on codes a (M,K), b (K,8) and sums c (M,8)."""
    out = spread(c, shape.c).contiguous()
    library.run(name, registers(spread(a, shape.a), shape.bits), registers(spread(b, shape.b), shape.bits), out, start,
                **mode)
    return out


@pytest.mark.parametrize("name", MMA)
def test_mma(library, name: str, order: dict, rounding: dict) -> None:
    shape, format_a, format_b = MMA[name]
    a, b = random_codes(format_a, shape.m, shape.k), random_codes(format_b, shape.k, 8)
    c = torch.randint(-1000, 1000, (shape.m, 8)).to(sum_type(format_a))
    want = c.double() + DECODE[format_a](a) @ DECODE[format_b](b)
    got = run_mma(library, name, shape, a, b, c, **order, **rounding)
    assert torch.equal(got.double(), spread(want, shape.c))


@pytest.mark.parametrize("name", WITH_START)
def test_mma_from_one_number(library, name: str) -> None:
    shape, format_a, format_b = MMA[name]
    a, b = random_codes(format_a, shape.m, shape.k), random_codes(format_b, shape.k, 8)
    c = torch.full((shape.m, 8), -1, dtype=torch.int32)  # not looked at
    product = spread(DECODE[format_a](a) @ DECODE[format_b](b), shape.c)
    assert torch.equal(run_mma(library, name + "_from", shape, a, b, c, 77).double(), 77 + product)
    as_float = run_mma(library, name + "_from", shape, a, b, c, MAGIC).view(torch.float32).double()
    assert torch.equal(as_float, 1.5 * 2**23 + product)


def test_integer_sums_wrap(library) -> None:
    shape, _, _ = MMA["mma_m16n8k32_s8"]
    a, b = torch.full((16, 32), 127), torch.full((32, 8), 127)
    got = run_mma(library, "mma_m16n8k32_s8", shape, a, b, torch.full((16, 8), 2**31 - 1, dtype=torch.int32))
    assert torch.equal(got, torch.full_like(got, 2**31 - 1 + 32 * 127**2 - 2**32))


@pytest.mark.parametrize("name", ("mma_m16n8k8_f16", "mma_m16n8k16_f16", "mma_m16n8k16_bf16"))
@pytest.mark.parametrize("truncate", (False, True))
def test_float_sums_are_rounded_once(library, name: str, truncate: bool) -> None:
    shape, fmt, _ = MMA[name]
    a, b = (float_codes(torch.randn(size), DECODED[fmt]) for size in ((shape.m, shape.k), (shape.k, 8)))
    c = torch.randn(shape.m, 8)
    exact = spread(c.double() + DECODE[fmt](a) @ DECODE[fmt](b), shape.c)
    got = run_mma(library, name, shape, a, b, c, truncate=truncate)
    nearest = exact.float()
    toward_zero = torch.where(nearest.double().abs() > exact.abs(), nearest.nextafter(torch.zeros(())), nearest)
    assert not torch.equal(nearest, toward_zero)
    assert torch.equal(got, toward_zero if truncate else nearest)


def nvf4_operands() -> tuple[Tensor, ...]:
    """Codes, scales and sums, of which no product rounds; and the sum."""
    a, b = random_codes("e2m1", 16, 64), random_codes("e2m1", 64, 8)
    scale_a, scale_b = torch.randint(0x28, 0x48, (16, 4)), torch.randint(0x28, 0x48, (4, 8))  # sums remain exact
    c = torch.randint(-1000, 1000, (16, 8)).float()
    value_a, value_b = (scales.to(torch.uint8).view(torch.float8_e4m3fn).double() for scales in (scale_a, scale_b))
    want = c.double() + ((DECODE["e2m1"](a) * value_a.repeat_interleave(16, 1))
                         @ (DECODE["e2m1"](b) * value_b.repeat_interleave(16, 0)))
    return a, b, scale_a, scale_b, c, want


@pytest.mark.parametrize("lane", range(4))
@pytest.mark.parametrize("pair", range(2))
def test_mma_nvf4(library, pair: int, lane: int, order: dict, rounding: dict) -> None:
    """The selectors: which pair of a quad's lanes has scales of A, and which of its lanes those of B."""
    shape = fragments.M16N8K64_4BIT
    a, b, scale_a, scale_b, c, want = nvf4_operands()
    held_a, held_b = torch.full((8, 4, 4), 255), torch.full((8, 4, 4), 255)  # lanes that hold no scales have NaN
    held_a[:, 2 * pair], held_a[:, 2 * pair + 1], held_b[:, lane] = scale_a[:8], scale_a[8:], scale_b.T
    ra = torch.cat([registers(spread(a, shape.a), 4), registers(held_a, 8)], 1)
    rb = torch.cat([registers(spread(b, shape.b), 4), registers(held_b, 8)], 1)
    for name in ("mma_m16n8k64_nvf4_selected", "mma_m16n8k64_nvf4")[:1 if pair or lane else 2]:
        got = spread(c, shape.c).contiguous()
        library.run(name, ra, rb, got, pair * 4 + lane, **order, **rounding)
        assert torch.equal(got.double(), spread(want, shape.c))


def test_every_scale_of_nvf4(library) -> None:
    shape = fragments.M16N8K64_4BIT
    one = torch.full((32, 32), 2)  # e2m1: 1
    for first in range(0, 128, 8):
        held = torch.full((32, 4), 255)
        held[::4] = torch.arange(first, first + 8).view(8, 1)  # rows 0 to 7
        held[1::4] = 0x38  # e4m3: 1
        unit = torch.full((32, 4), 0x38)
        got = torch.zeros(32, 4)
        library.run("mma_m16n8k64_nvf4", torch.cat([registers(one, 4), registers(held, 8)], 1),
                    torch.cat([registers(one[:, :16], 4), registers(unit, 8)], 1), got, 0)
        want = torch.full((16, 8), 64.0)
        want[:8] = 64 * torch.arange(first, first + 8).to(torch.uint8).view(torch.float8_e4m3fn).float().view(8, 1)
        assert torch.equal(got.nan_to_num(-1), spread(want, shape.c).nan_to_num(-1))


# ---- ldmatrix, cp.async ---------------------------------------------------------------------------------------------


def test_ldmatrix(library, order: dict) -> None:
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = {n: torch.zeros(2, 32, n, dtype=torch.int32) for n in (4, 2, 1)}  # plain, transposed
    counted = library.run("ldmatrix", matrices, *out.values(), **order)
    for n, got in out.items():
        for transposed, loaded in enumerate(got):
            source = matrices.transpose(1, 2) if transposed else matrices
            want = source[:n].reshape(n, 32, 2).transpose(0, 1)  # lane l: columns 2·(l % 4) and the next of row l / 4
            assert torch.equal(loaded.view(torch.int16).view(32, n, 2), want)
    assert counted.ldmatrix_matrices == counted.ldmatrix_phases == 2 * (4 + 2 + 1)


def test_cp_async_fills_up_with_zeros(library, order: dict) -> None:
    source = torch.randint(1, 256, (32, 16), dtype=torch.uint8)
    counts = (torch.arange(32, dtype=torch.int32) * 5) % 17
    out = {size: torch.full((32, size), 255, dtype=torch.uint8) for size in (16, 8, 4)}
    library.run("copy", source, counts, *out.values(), **order)
    for size, got in out.items():
        assert torch.equal(got, torch.where(torch.arange(size) < counts[:, None], source[:, :size], 0))


# ---- conversions ----------------------------------------------------------------------------------------------------


def halves(words: Tensor) -> Tensor:
    """(…, 2): the low and the high 16 bits of each word."""
    return torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).to(torch.int32).to(torch.int16)


def same_numbers(got: Tensor, want: Tensor) -> bool:
    """The same bits, but for which NaN."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        torch.where(got.isnan(), 0, got).view(torch.int16), torch.where(want.isnan(), 0, want).view(torch.int16))


def test_numbers_become_narrow(library) -> None:
    grid = torch.arange(-2048, 2048) / 256  # every tie of e2m1
    eight = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (eight[1:] + eight[:-1]) / 2  # every tie of e4m3, and its neighbours
    grid = torch.cat([grid, eight, middle, *(middle.nextafter(torch.tensor(to)) for to in (0.0, 999.0)), 444 + grid])
    wide = torch.randn(4000) * torch.exp2(torch.randint(-30, 20, (4000,)))
    ties = torch.cat([torch.arange(2048) * 2.0**-25, 1 + torch.arange(64) * 2.0**-11, 1 + torch.arange(64) * 2.0**-8])
    edges = torch.tensor([0.0, -0.0, 65504, 65519.99, 65520, -65536, 3.4e38, torch.inf, -torch.inf, torch.nan, 2**-126])
    x = torch.cat([grid, wide, ties, edges])
    bf16s, f16s, singles, e2m1, e4m3s = (torch.zeros(len(x), dtype=torch.int32) for _ in range(5))
    library.run("narrow", x, bf16s, f16s, singles, e2m1, e4m3s)

    both = torch.stack([x, -x], -1)
    assert same_numbers(halves(bf16s).view(torch.bfloat16), both.bfloat16())
    assert same_numbers(halves(f16s).view(torch.float16), both.half())
    assert torch.equal(halves(singles)[:, 0], halves(bf16s)[:, 0])
    assert torch.equal(halves(singles)[:, 1], halves(f16s)[:, 0])
    assert halves(bf16s)[x.isnan()].tolist() == halves(f16s)[x.isnan()].tolist() == [[0x7FFF, 0x7FFF]]

    values = fragments.E2M1[torch.stack([e2m1 & 15, e2m1 >> 4], -1).long()]
    assert torch.equal(values.signbit()[~x.isnan()], both.signbit()[~x.isnan()])
    assert torch.equal(values.abs(), nearest_e2m1(both.abs().nan_to_num(6)))

    found = torch.stack([e4m3s & 255, e4m3s >> 8], -1)
    want = both.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert torch.equal(found, torch.where(both.isnan(), 0x7F, want))


def nearest_e2m1(magnitudes: Tensor) -> Tensor:
    """Half to even: of two equally near values, the one whose code is even."""
    distance = (magnitudes.double().clamp(max=6).unsqueeze(-1) - fragments.E2M1[:8]).abs()
    preferred = distance + torch.tensor([0, 1e-9] * 4)
    return fragments.E2M1[preferred.argmin(-1)]


def test_numbers_become_wide(library) -> None:
    x = torch.cat([torch.arange(1 << 16) << 16 | (torch.arange(1 << 16) * 7 + 1) & 0xFFFF,  # each value in either half
                   torch.arange(1 << 16), torch.tensor([2**24 + 1, 2**31 - 1, 2**31 - 65])])
    x = x.sub(x >> 31 << 32).to(torch.int32)
    out = torch.zeros(len(x), 7)
    library.run("widen", x, out)
    bf, f = halves(x).view(torch.bfloat16).float(), halves(x).view(torch.float16).float()
    want = torch.cat([bf, f, bf[:, :1], f[:, :1], x.float().view(-1, 1)], 1)
    assert same_numbers(out, want)


# ---- shuffles, approximate functions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("float", torch.float32), ("int", torch.int32), ("uint32", torch.uint32)])
@pytest.mark.parametrize("by", ("one for all", "one for each"))
def test_shuffles(library, name: str, dtype: torch.dtype, by: str, order: dict) -> None:
    values = (torch.arange(32) * 1001 + 7).to(dtype)
    ask = torch.randint(0, 32, (32,)) if by == "one for each" else torch.randint(0, 32, (1,)).expand(32)
    out = torch.zeros(32, 6, dtype=torch.int32).view(dtype)
    library.run(f"shuffle_{name}", values, ask.to(torch.int32), out, **order)

    own = torch.arange(32)
    for first, width in ((0, 32), (3, 8)):
        begin = own // width * width

        def clamp(lane: Tensor, last: Tensor = begin + width - 1) -> Tensor:  # a lane beyond: one's own value
            return torch.where(lane <= last, lane, own)

        for column, source in enumerate((clamp(own ^ ask), clamp(own + ask), begin + ask % width), first):
            assert torch.equal(out[:, column].long(), values.long()[source])


def test_approximate_functions_err_as_much_as_they_may(library, rounding: dict) -> None:
    x = torch.cat([torch.randn(500) * 4, torch.tensor([1.0, -0.0, 1e-30, -130.0, 1e-40])])
    out = torch.zeros(len(x), 4)
    library.run("approx", x, out, **rounding)
    v = x.double()
    flushed = torch.where(v.abs() < 2**-126, torch.copysign(torch.zeros(()).double(), v), v)
    want = torch.stack([v.exp2(), v.tanh(), 1 / flushed, v.abs().rsqrt()], 1)
    want = torch.where(want.abs() < 2**-126, 0, want)
    allowed = torch.tensor([2**-22, 2**-11, 2**-23, 2**-22])
    finite = want.isfinite()
    error = ((out.double() - want).abs() / want.abs().clamp(min=2**-126))[finite]
    assert (error <= (allowed * bool(rounding) + 2**-24).expand_as(want)[finite]).all()
    assert (error.max() > 2**-12) == bool(rounding)
    assert torch.equal(out[~finite], want[~finite].float())
