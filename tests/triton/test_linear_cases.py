"""The linear ops by Triton's kernels in the calls of the CUDA kernels' tests; what is exact; what is refused."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.backends.triton import device as gpu
from nunchaku_py.formats import INT4, NVFP4
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.tensor import QTensor
from tests.ops.helpers import ENDINGS
from tests.simt import calls, nvfp4
from tests.simt.test_linear_w4a8 import SIZES, assert_as_the_reference, assert_same_int8, ended, operands
from tests.simt.test_linear_w4a16 import bound

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
INT8 = ActSpec("int8")
MANY = 70  # rows for which a 4-bit weight is expanded by itself


@pytest.fixture
def blackwell(request: pytest.FixtureRequest, device: str) -> str:
    """Where NVFP4 is multiplied."""
    if device == "cpu":
        request.getfixturevalue("as_blackwell")
    elif torch.cuda.get_device_capability() not in gpu.NVFP4:
        pytest.skip("this GPU multiplies no NVFP4")
    return device


def run(op: ops.Op, device: str, *args: object) -> object:
    with ops.backend("triton"):
        return calls.run(op, device, *args)


def each(found: object) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


@pytest.mark.parametrize("suffix", ENDINGS)
@pytest.mark.parametrize("m, n, k, r", [(70, 384, 192, 48), (1, 384, 64, 16), (35, 768, 128, 0)])
@DTYPES
def test_int8(device: str, suffix: str, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    more, spec = ended(suffix, m, n, k, dtype)
    op, args = ops.OPS[f"linear_w4a8{suffix}"], (*operands(m, n, k, r, dtype), *more, spec)
    assert_as_the_reference(op, run(op, device, *args), args)


@DTYPES
def test_int4(device: str, dtype: torch.dtype) -> None:
    assert_all_endings(device, dtype, calls.operands, calls.specs, calls.CODES)


@DTYPES
def test_nvfp4(blackwell: str, dtype: torch.dtype) -> None:
    assert_all_endings(blackwell, dtype, partial(nvfp4.operands, branch=1 / 8), nvfp4.specs, nvfp4.CODES)


def assert_all_endings(device: str, dtype: torch.dtype, operands: Callable, specs: Callable, act: ActSpec) -> None:
    for op, _, rows in calls.endings(dtype, operands, lambda args: args, specs, act):
        for args in rows:
            got, want = run(op, device, *args), op.reference(*args)
            if op.name.endswith("_quantize"):
                assert_same_codes(got, want)
            else:
                for one, other in zip(each(got), each(want), strict=True):
                    nvfp4.assert_near(one, other)


def assert_same_codes(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """z may have been rounded to the neighbour in 16 bit: then its code, or the scale of its group, is near it."""
    (qx, sx, h), (want_qx, want_sx, want_h) = got, want
    assert ((sx.double() - want_sx.double()).abs() <= 0.13 * want_sx.double()).all()
    apart = (qx != want_qx).double().mean()
    assert apart < 0.05
    torch.testing.assert_close(h, want_h, rtol=0, atol=0.02 * float(want_h.abs().amax(None)) if h.numel() else 0)


def test_signs_of_scales_are_not_lost(blackwell: str) -> None:
    """The instruction does not look at them. A weight is looked at anew when it has changed."""
    spec = LinearSpec("nvfp4", 16, 64, ActSpec("nvfp4", 16))
    args = [tensor.to(blackwell) for tensor in nvfp4.operands(4, 64, 64, 16, torch.bfloat16)]
    refuses = ops.linear_w4a4.backends["triton"].refuses
    assert refuses(*args, spec) is None
    args[3].view(torch.uint8)[3, 1] |= 0x80
    args[3].copy_(args[3].clone())
    assert refuses(*args, spec) == "its scales have signs, which the instruction for NVFP4 does not look at"


@pytest.mark.parametrize("weight, dtype", [
    ("int4", torch.bfloat16), ("uint4", torch.bfloat16), ("int4", torch.float16)])
@pytest.mark.parametrize("m, n, k, r, group", [
    (1, 16, 64, 0, 64), (5, 23, 1120, 40, 64), (3, 9, 96, 16, 64), (2, 8, 384, 0, 128), (70, 144, 352, 48, 32),
    (64, 64, 96, 160, 64), (129, 80, 384, 0, 128)])
def test_16_bit(device: str, weight: str, dtype: torch.dtype, m: int, n: int, k: int, r: int, group: int) -> None:
    torch.manual_seed(m + n + k + r)
    groups = -(-k // group)
    x, qw = torch.randn(m, k).to(dtype), torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales, zeros = (0.01 + torch.rand(n, groups) / 20).to(dtype), torch.randn(n, groups).to(dtype) / 4
    h, up, bias = torch.randn(m, r) / 8, torch.randn(n, r).to(dtype), torch.randn(n)
    args = (x, torch.empty(0), qw, scales, zeros if weight == "uint4" else torch.empty(0), h, up, bias,
            LinearSpec(weight, group, k, ActSpec("none", group)))
    got, want = run(ops.linear_w4a16, device, *args), ops.linear_w4a16.reference(*args)
    assert ((got.double() - want.double()).abs() <= bound(want, x, h, up, k, True)).all()


# ------------------------------------------------------------------------------------------------------- what is exact
@pytest.mark.parametrize("m, n, k, r", SIZES)
def test_integers_are_exact(device: str, m: int, n: int, k: int, r: int) -> None:
    """Without a branch nothing is left to round otherwise: the same bits."""
    args = (*operands(m, n, k, 0, torch.float16), LinearSpec("int8", 0, k, INT8))
    assert torch.equal(run(ops.linear_w4a8, device, *args), ops.linear_w4a8.reference(*args))
    full = torch.full((m, k), 127, dtype=torch.int8), torch.full((n, k), -127, dtype=torch.int8)
    args = (full[0], args[1], full[1], *args[3:])
    assert torch.equal(run(ops.linear_w4a8, device, *args), ops.linear_w4a8.reference(*args))


@pytest.mark.parametrize("fmt", [INT4, NVFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("k", [24, 192])
@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**100])
@DTYPES
def test_expanding_gives_the_integers_of_the_fold(device: str, fmt, k: int, scale: float, dtype: torch.dtype) -> None:
    """As all the columns of an identity: y = w8·s_ch, exactly; in the product, and by itself."""
    n = 48
    w = torch.randn(n, k) * torch.rand(n, -(-k // 16)).repeat_interleave(16, 1)[:, :k].exp()
    w[5] = 0
    weight = QTensor.quantize(w * (scale if dtype == torch.bfloat16 else 1), fmt, scale_dtype=dtype)
    if fmt is INT4:
        weight.codes[7, :3] = 0x88  # −8, which files of others may have
        weight.scales[9] = 254 / 256  # 127 times a power of two: weights lie halfway between two integers
    w8, row_scales = weight.fold_int8()
    aux = torch.cat([row_scales, *([] if weight.channel_scale is None else [weight.channel_scale])])
    spec = LinearSpec(fmt.name, fmt.group, k, INT8, row_scales=True)
    want = (w8.float() * row_scales.unsqueeze(1)).T.to(dtype)
    for rows in (k, MANY):
        unit = torch.eye(k, dtype=torch.int8).repeat(-(-rows // k), 1)[:rows]
        tensors = (unit, torch.ones(rows), weight.codes, weight.scales, aux, torch.empty(rows, 0),
                   torch.empty(n, 0).to(dtype), torch.zeros(n))
        assert torch.equal(run(ops.linear_w4a8, device, *tensors, spec), want.repeat(-(-rows // k), 1)[:rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_and_no_other(device: str, bad: float) -> None:
    x, down = torch.randn(17, 192).half(), torch.randn(16, 192).half() / 14
    x[5, 70] = bad
    qx, sx, _ = run(ops.quantize_act, device, x, torch.ones(192), down, INT8)
    more, spec = ended("_gelu_quantize", 17, 128, 192, torch.float16)
    args = (qx, sx, *operands(17, 128, 192, 16, torch.float16)[2:], *more, spec)
    got = run(ops.linear_w4a8_gelu_quantize, device, *args)
    assert got[1].isnan().nonzero().tolist() == [[5]]
    keep = torch.arange(17) != 5
    assert_same_int8(tuple(t[keep] for t in got),
                     tuple(t[keep] for t in ops.linear_w4a8_gelu_quantize.reference(*args)))


def test_no_rows(device: str) -> None:
    for suffix in ENDINGS:
        more, spec = ended(suffix, 4, 384, 64, torch.bfloat16)
        args = [t[:0] if t.shape[:1] == (4,) else t for t in (*operands(4, 384, 64, 16), *more)]
        if suffix == "_qkv_rope":
            args[-1] = more[-1]
        assert each(run(ops.OPS[f"linear_w4a8{suffix}"], device, *args, spec))[0].shape[0] == 0


def test_no_channels(device: str) -> None:
    args = *operands(4, 0, 64, 16), LinearSpec("int8", 0, 64, INT8)
    assert run(ops.linear_w4a8, device, *args).shape == (4, 0)


def test_views_of_any_strides(device: str) -> None:
    qx, sx, qw, sw, *rest = operands(70, 384, 192, 48)
    spec = LinearSpec("int8", 0, 192, INT8)
    turned = qx.T.contiguous().T, sx.repeat_interleave(2)[::2], torch.cat((qw, qw), 1)[:, :192], sw
    got = run(ops.linear_w4a8, device, *turned, *rest, spec)
    assert torch.equal(got, run(ops.linear_w4a8, device, qx, sx, qw, sw, *rest, spec))


# ------------------------------------------------------------------------------------------------------------- refusals
def args_of(act: str = "int8", weight: str = "int8", group: int = 0, k: int = 64, dtype: torch.dtype = torch.bfloat16,
            n: int = 32, **more: object) -> tuple:
    """Of an ending that needs nothing; only sizes and types matter."""
    acts = {"int8": INT8, "none": ActSpec("none"), "int4": ActSpec("int4", 64), "nvfp4": ActSpec("nvfp4", 16)}
    empty = torch.empty(0)
    return (torch.empty(4, k), empty, torch.empty(n, k), empty, empty, empty, torch.empty(n, 16, dtype=dtype), empty,
            LinearSpec(weight, group, k, acts[act], **more))


@pytest.mark.parametrize(("call", "said"), [
    (dict(dtype=torch.float32), "it computes in bfloat16 or float16, not float32"),
    (dict(weight="int4", group=64, k=63, row_scales=True), "an even number of inputs, not 63"),
    (dict(k=0), "no linear without inputs"),
    (dict(weight="int4", group=64), "int4 and nvfp4 ones whose scales are given, not int4 ones"),
    (dict(weight="int4", group=48, row_scales=True), "int4 in groups of 16, 32 … 128, not 48"),
    (dict(act="none"), "it multiplies INT8 weights by INT8 activations only"),
    (dict(act="none", weight="uint4", group=256), "uint4 in groups of 16, 32 … 128, not 256"),
    (dict(act="int4", weight="nvfp4", group=16), "int4 in groups of 64 by nvfp4 in groups of 16"),
    (dict(act="nvfp4", weight="nvfp4", group=16), "a GPU of compute capability 8.9 has no instruction for NVFP4"),
])
def test_what_the_kernels_do_not_take_is_a_sentence(as_gpu: None, call: dict, said: str) -> None:
    args = args_of(**call)
    assert said in ops.OPS["linear_w4a8"].backends["triton"].refuses(*args)


@pytest.mark.parametrize(("suffix", "more", "said"), [
    ("_qkv_rope", dict(head_dim=24), "heads of 2, 4 … 128, not 24"),
    ("_gelu_quantize", dict(next=ActSpec("int4", 128)), "in groups of 16, 32 … 64, not 128"),
    ("_glu_quantize", dict(next=ActSpec("int4", 64), n=34), "an even number of columns, not 17"),
])
def test_what_the_endings_do_not_take_is_a_sentence(as_gpu: None, suffix: str, more: dict, said: str) -> None:
    args = args_of(**more)
    assert said in ops.OPS[f"linear_w4a8{suffix}"].backends["triton"].refuses(*args)


def test_what_machines_lack_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.linear_w4a8
    assert op.backends["triton"].refuses(*args_of()) == "the tensors are on cpu"
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "capability_of", lambda device: (7, 5))
    assert op.backends["triton"].refuses(*args_of()) == "its kernels need compute capability 8.0, this GPU has 7.5"
    for version, said in (("3.5.1", "its kernels need triton 3.6, this is 3.5.1"), (None, "triton is not installed")):
        monkeypatch.setattr(gpu.importlib.metadata, "version", partial(version_of, version))
        gpu.refuses_triton.cache_clear()
        assert said in op.backends["triton"].refuses(*args_of())
    monkeypatch.undo()
    gpu.refuses_triton.cache_clear()


def version_of(version: str | None, name: str) -> str:
    if version is None:
        raise gpu.importlib.metadata.PackageNotFoundError(name)
    return version


def test_a_gradient_is_not_lost(as_gpu: None) -> None:
    x = torch.zeros(4, 64).bfloat16().requires_grad_()
    args = (x, *args_of("none", "int4", 64)[1:])
    assert ops.linear_w4a16.backends["triton"].refuses(*args) == "it gives no gradient"
