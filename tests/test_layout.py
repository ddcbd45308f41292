"""Layouts: against index formulas written out by hand, and against themselves."""
import itertools
import re
import shutil
import subprocess

import pytest
import torch

from nunchaku_py.errors import NunchakuError
from nunchaku_py.layout import Layout

WEIGHT = Layout("(N p:8 i:2 g:8) (K j:2 t:4 r:8) -> N K p g t i j r")
SCALE = Layout("(N a:8 h:2 t:4 e:2) (G) -> N G a t h e")
MICRO_SCALE = Layout("(N s:4 q:4 g:8) (K r:4) -> N K g q s r")
ROTARY = Layout("(M a:2 g:8) (D t:4 e:2) -> M D g t a e")


def weight_offset(n, k, size_k):
    nt, np, ns, nl = n // 128, n % 128 // 16, n % 16 // 8, n % 8
    kt, ks, kl, e = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    return ((((((nt * (size_k // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 2 + ns) * 2 + ks) * 8 + e


def scale_offset(n, g, groups):
    r = n % 128
    return ((((n // 128 * groups + g) * 8 + r // 16) * 4 + r % 8 // 2) * 2 + r % 16 // 8) * 2 + r % 2


def micro_scale_offset(n, g, groups):
    r = n % 128
    return ((((n // 128 * (groups // 4) + g // 4) * 8 + r % 8) * 4 + r % 32 // 8) * 4 + r // 32) * 4 + g % 4


def rotary_offset(m, d, size_d):
    return ((((m // 16 * (size_d // 8) + d // 8) * 8 + m % 8) * 4 + d % 8 // 2) * 2 + m % 16 // 8) * 2 + d % 2


CASES = [
    (WEIGHT, (256, 128), weight_offset),
    (SCALE, (256, 3), scale_offset),
    (MICRO_SCALE, (256, 8), micro_scale_offset),
    (ROTARY, (32, 16), rotary_offset),
]


@pytest.mark.parametrize("layout, shape, formula", CASES)
def test_pack_puts_every_element_where_the_formula_says(layout, shape, formula):
    x = torch.arange(shape[0] * shape[1]).view(shape)
    memory = layout.pack(x).flatten()
    rows, columns = torch.meshgrid(*(torch.arange(s) for s in shape), indexing="ij")
    assert torch.equal(memory[formula(rows, columns, shape[1])], x)


@pytest.mark.parametrize("layout, shape, formula", CASES)
def test_offset_agrees_with_the_formula(layout, shape, formula):
    for n, k in itertools.product(range(0, shape[0], 7), range(shape[1])):
        assert layout.offset((n, k), shape) == formula(n, k, shape[1])


@pytest.mark.parametrize("layout, shape, formula", CASES)
def test_cpp_agrees_with_the_formula(layout, shape, formula):
    source = layout.to_cpp("place")
    body = re.search(r"return (.*);", source).group(1).replace("/", "//")
    (n, k), (size_n, size_k) = (axis[0].name for axis in layout.axes), shape
    for row, column in itertools.product(range(0, shape[0], 7), range(shape[1])):
        values = {n.lower(): row, n: size_n, k.lower(): column, k: size_k}
        assert eval(body, {}, values) == formula(row, column, size_k)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_cpp_compiles_and_is_constexpr(tmp_path):
    source = tmp_path / "offset.cpp"
    expected = weight_offset(77, 91, 128)
    source.write_text(WEIGHT.to_cpp("place") + f"static_assert(place(77, 256, 91, 128) == {expected});\n")
    subprocess.run(["g++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", str(source)], check=True)


@pytest.mark.parametrize("shape", [(128, 64), (1, 1), (129, 65), (200, 200), (0, 64)])
def test_pad_pack_unpack_round_trip(shape):
    x = torch.randint(-7, 8, shape, dtype=torch.int8)
    packed = WEIGHT.pack(WEIGHT.pad(x, 5))
    assert packed.shape == WEIGHT.padded(shape) and packed.is_contiguous()
    assert torch.equal(WEIGHT.unpack(packed, shape), x)
    assert (WEIGHT.unpack(packed)[shape[0]:] == 5).all() and (WEIGHT.unpack(packed)[:, shape[1]:] == 5).all()


def test_non_contiguous_input():
    x = torch.arange(256 * 128).view(128, 256).T
    assert torch.equal(WEIGHT.pack(x), WEIGHT.pack(x.contiguous()))


def test_three_axes_and_fixed_axis():
    layout = Layout("(B) (i:2 j:3) (K r:2) -> K i B r j")
    x = torch.arange(2 * 6 * 4).view(2, 6, 4)
    assert torch.equal(layout.unpack(layout.pack(x)), x)
    for place in itertools.product(range(2), range(6), range(4)):
        assert layout.pack(x).flatten()[layout.offset(place, (2, 6, 4))] == x[place]
    with pytest.raises(NunchakuError, match="does not divide into tiles"):
        layout.pack(torch.zeros(2, 12, 4))


@pytest.mark.parametrize("line, sentence", [
    ("N K", "axes in parentheses"),
    ("(N i:2) -> N", "every factor once"),
    ("(N i:2) (K i:2) -> N i K i", "every factor once"),
    ("(i:2 N) -> N i", "first of its axis"),
    ("(n i:2) -> n i", "upper case"),
])
def test_a_wrong_line_is_refused(line, sentence):
    with pytest.raises(NunchakuError, match=sentence):
        Layout(line)


def test_wrong_tensors_are_refused():
    with pytest.raises(NunchakuError, match=r"\(100, 64\) does not divide into tiles of \(128, 64\)"):
        WEIGHT.pack(torch.zeros(100, 64))
    with pytest.raises(NunchakuError, match="expected 2 axes"):
        WEIGHT.pad(torch.zeros(4))
    with pytest.raises(NunchakuError, match="expected 8192 elements"):
        WEIGHT.unpack(torch.zeros(64, 64), (100, 60))
