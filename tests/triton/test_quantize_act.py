"""kernels/quantize_act.py against the reference of the op, to the bit."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor

from nunchaku_py import NunchakuError
from nunchaku_py.ops import OPS, ActSpec, backend
from nunchaku_py.ops.spec import MMA
from tests.backends.cpu_cases import SPICES, Case, cases, quantize_args
from tests.ops.helpers import op_args
from tests.triton import bits

FUZZ = settings(max_examples=30, derandomize=True, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
PLAIN = Case(5, 33, 18, 3, torch.bfloat16, "nvfp4", "int4", 16, 0)
SIZES = [(1, 64, 16), (33, 320, 0), (70, 448, 48), (16, 128, 40), (20, 192, 150), (0, 64, 16), (3, 0, 2)]


def operands(m: int, k: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = (torch.randn(m, k) * torch.rand(k).exp()).to(dtype)
    return x, 1 / (0.5 + torch.rand(k)), torch.randn(r, k).to(dtype)


@FUZZ
@given(cases(acts=bits.ACTS))
@example(replace(PLAIN, shift=-0.25))
@example(replace(PLAIN, act="uint4", dtype=torch.float16, group=128, k=300, shift=0.171875, spices=frozenset(SPICES)))
def arithmetic(case: Case) -> None:
    args = quantize_args(bits.taken(case))
    bits.assert_quantized(bits.run(arithmetic.device, "quantize_act", *args), *args)


def test_arithmetic(device: str) -> None:
    arithmetic.device = device
    arithmetic()


@pytest.mark.parametrize("spice", SPICES)
@pytest.mark.parametrize("act", bits.ACTS)
def test_numbers_that_arithmetic_trips_over(device: str, act: str, spice: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        args = quantize_args(replace(PLAIN, m=17, k=75, act=act, dtype=dtype, spices=frozenset({spice})))
        bits.assert_quantized(bits.run(device, "quantize_act", *args), *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("m, k, r", SIZES)
@pytest.mark.parametrize("spec", [ActSpec("int4", 64), ActSpec("uint4", 64, 0.171875), ActSpec("nvfp4", 16),
                                  ActSpec("int8")], ids=lambda spec: spec.format)
def test_sizes(device: str, dtype: torch.dtype, m: int, k: int, r: int, spec: ActSpec) -> None:
    args = operands(m, k, r, dtype)
    got = bits.run(device, "quantize_act", *args, spec)
    bits.assert_quantized(got, *args, spec)
    again = bits.run(device, "quantize_act", *args, spec)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize("group", [48, 512])
def test_16_bit_has_no_groups(device: str, group: int) -> None:
    """Whatever groups its weight has."""
    args = *operands(5, 96, 16, torch.bfloat16), ActSpec("none", group)
    bits.assert_quantized(bits.run(device, "quantize_act", *args), *args)


def near(values: Tensor) -> Tensor:
    """The values and their neighbours."""
    far = torch.full_like(values, float("inf"))
    return torch.stack((values.nextafter(-far), values, values.nextafter(far)), 1).flatten()


def test_every_scale_of_nvfp4_that_lies_between_two(device: str) -> None:
    """Groups of one number: six times what lies halfway between two e4m3, which rounds to the even, or next to it."""
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tops = near(torch.cat((e4m3, (e4m3[1:] + e4m3[:-1]) / 2, torch.tensor([464.0, 1e30, 2.0**-130]))) * 6).abs()
    x, inv_smooth = torch.zeros(1, tops.numel() * 16, dtype=torch.float16), torch.zeros(tops.numel() * 16)
    x[:, ::16], inv_smooth[::16] = 1, tops
    args = x, inv_smooth, torch.zeros(0, x.shape[1], dtype=torch.float16), ActSpec("nvfp4", 16)
    bits.assert_quantized(bits.run(device, "quantize_act", *args), *args)


@pytest.mark.parametrize("scale", [1.0, 0.0048828125, 13.0])
@pytest.mark.parametrize("spec", [ActSpec("int4", 128), ActSpec("uint4", 128), ActSpec("nvfp4", 128), ActSpec("int8")],
                         ids=lambda spec: spec.format)
def test_every_code_that_lies_between_two(device: str, spec: ActSpec, scale: float) -> None:
    top = spec.fmt.top
    steps = near(torch.arange(0, 4 * top + 1) / 4.0)
    groups = torch.cat((torch.full((len(steps), 1), float(top)), steps[:, None], -steps[:, None]), 1).clamp(-top, top)
    inv_smooth = torch.zeros(len(steps), spec.group or 4)
    inv_smooth[:, :3] = groups * scale
    x = torch.ones(1, inv_smooth.numel(), dtype=torch.bfloat16)
    args = x, inv_smooth.flatten(), torch.zeros(0, x.shape[1], dtype=torch.bfloat16), spec
    bits.assert_quantized(bits.run(device, "quantize_act", *args), *args)


def refused(*args: Tensor | ActSpec) -> str:
    with backend("triton"), pytest.raises(NunchakuError) as error:
        OPS["quantize_act"](*args)
    return str(error.value)


def test_refusals(as_ampere: None) -> None:
    x, inv_smooth, down, spec = op_args("quantize_act")
    assert "triton: it computes in bfloat16 or float16, not float32" in refused(
        x.float(), inv_smooth, down.float(), spec)
    assert "triton: it quantizes in groups of 16, 32, 64, 128, not 48" in refused(
        x, inv_smooth, down, ActSpec("int4", 48))
    packed = refused(x, inv_smooth, down, ActSpec("int4", 64, layout=MMA))
    assert "triton: a tensor is laid out as 'mma', this backend takes 'row'" in packed


def test_tensors_elsewhere_are_refused() -> None:
    assert "triton: the tensors are on cpu" in refused(*op_args("quantize_act"))
