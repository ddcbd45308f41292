"""INT8 activations on the CUDA backend, executed on the host and on a GPU: quantizing, expanding, every ending."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nunchaku_py import native, ops
from nunchaku_py.backends.cuda import device as gpu
from nunchaku_py.formats import INT4, NVFP4
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.tensor import QTensor
from tests.simt.calls import run
from tests.simt.test_linear_w4a4_endings import assert_near

INT8 = ActSpec("int8")
ENDINGS = ("", "_gate_residual", "_qkv_rope", "_gelu_quantize", "_glu_quantize")
SIZES = [(1, 128, 64, 16), (130, 144, 192, 48), (63, 256, 320, 0), (40, 16, 128, 160)]


@pytest.fixture(params=["host", "hopper", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: as on most GPUs, as on Hopper, or on the GPU there is."""
    if request.param == "gpu":
        return "cuda"
    request.getfixturevalue("as_hopper" if request.param == "hopper" else "as_gpu")
    return "cpu"


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """qx, sx, w8, s_ch, aux, h, up, bias for y of about 1; codes of all magnitudes."""
    torch.manual_seed(m + n + k + r)
    small = 2e-4 / k**0.5
    return (torch.randint(-127, 128, (m, k), dtype=torch.int8), small * (1 + torch.rand(m)),
            torch.randint(-127, 128, (n, k), dtype=torch.int8), 1 + torch.rand(n), torch.empty(0),
            torch.randn(m, r) / (8 * r + 1), torch.randn(n, r).to(dtype), (torch.randn(n) / 4).to(dtype))


def ended(suffix: str, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], LinearSpec]:
    """What an ending takes beside the operands."""
    torch.manual_seed(m + n)
    spec = LinearSpec("int8", 0, k, INT8)
    if suffix == "_gate_residual":
        return (torch.randn(2 if m % 2 == 0 else 1, n).to(dtype), torch.randn(m, n).to(dtype)), spec
    if suffix == "_qkv_rope":
        angles = torch.rand(m, 8) * 6
        rotary = torch.stack([angles.cos(), angles.sin()], -1)
        return (1 + torch.rand(16), 1 + torch.rand(16), rotary), replace(spec, head_dim=16)
    if not suffix:
        return (), spec
    width = n // 2 if suffix == "_glu_quantize" else n
    more = 0.5 + torch.rand(width), (torch.randn(24, width) / 8).to(dtype)
    return more, replace(spec, activation="silu" if width < n else "gelu_tanh", gate_first=width < n, next=INT8)


def assert_as_the_reference(op: ops.Op, got: object, args: tuple) -> None:
    want = op.reference(*args)
    if "quantize" in op.name:
        assert_same_int8(got, want)
    else:
        for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
            assert_near(one, other)


def assert_same_int8(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """z may have been rounded to the neighbour in 16 bit: then its code, or the scale of its row, is near it."""
    (qx, sx, h), (want_qx, want_sx, want_h) = got, want
    assert ((sx - want_sx).abs() <= 2**-7 * want_sx).all()
    off = (qx.int() - want_qx.int()).abs()
    assert off.max() <= 2 and (off > 0).float().mean() < 0.1
    torch.testing.assert_close(h, want_h, rtol=0, atol=0.02 * float(want_h.abs().amax(None)) if h.numel() else 0)


@pytest.mark.parametrize("suffix", ENDINGS)
@pytest.mark.parametrize("m, n, k, r", [(70, 384, 192, 48), (1, 384, 64, 16), (35, 768, 128, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_endings(device: str, suffix: str, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    more, spec = ended(suffix, m, n, k, dtype)
    op, args = ops.OPS[f"linear_w4a8{suffix}"], (*operands(m, n, k, r, dtype), *more, spec)
    assert op.explain(*(t.to(device) if isinstance(t, Tensor) else t for t in args))["cuda"] == "can run"
    assert_as_the_reference(op, run(op, device, *args), args)


@pytest.mark.parametrize("m, n, k, r", SIZES)
def test_integers_are_exact(device: str, m: int, n: int, k: int, r: int) -> None:
    """Without a branch nothing is left to round otherwise: the same bits."""
    args = (*operands(m, n, k, 0, torch.float16), LinearSpec("int8", 0, k, INT8))
    assert torch.equal(run(ops.linear_w4a8, device, *args), ops.linear_w4a8.reference(*args))
    full = torch.full((m, k), 127, dtype=torch.int8), torch.full((n, k), -127, dtype=torch.int8)
    args = (full[0], args[1], full[1], *args[3:])
    assert torch.equal(run(ops.linear_w4a8, device, *args), ops.linear_w4a8.reference(*args))


@pytest.mark.parametrize("suffix", ENDINGS)
def test_several_in_one_launch(device: str, suffix: str) -> None:
    sizes = [(70, 384, 192, 48), (3, 768, 64, 16), (130, 384, 320, 0)]
    calls = []
    for m, n, k, r in sizes:
        more, spec = ended(suffix, m, n, k, torch.bfloat16)
        calls.append((*operands(m, n, k, r), *more, spec))
    op = ops.OPS[f"linear_w4a8{suffix}"]
    there = [tuple(t.to(device) if isinstance(t, Tensor) else t for t in args) for args in calls]
    for found, args, alone in zip(op.together(there), calls, there, strict=True):
        found, alone = ([t.cpu() for t in ((x,) if isinstance(x, Tensor) else x)] for x in (found, op(*alone)))
        assert all(map(torch.equal, found, alone))
        assert_as_the_reference(op, found[0] if len(found) == 1 else tuple(found), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("m, k, r", [(1, 64, 16), (33, 320, 0), (70, 448, 48), (16, 128, 140)])
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_quantizing(device: str, dtype: torch.dtype, m: int, k: int, r: int, norm: str) -> None:
    torch.manual_seed(m + k + r)
    x, inv_smooth = (torch.randn(m, k) * torch.rand(k).exp()).to(dtype), 1 / (0.5 + torch.rand(k))
    down = torch.randn(r, k).to(dtype) / k**0.5
    x[m // 2] = 0
    spec = ActSpec("int8", norm=norm)
    op = ops.quantize_act if norm == "none" else ops.norm_modulate_quantize
    more = () if norm == "none" else (torch.rand(k), torch.randn(1, k) / 4, torch.randn(1, k) / 4)
    args = (x, *(t.to(dtype) for t in more), inv_smooth, down, spec)
    got, want = run(op, device, *args), op.reference(*args)
    if norm == "none":
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert_same_int8(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_and_no_other(device: str, bad: float) -> None:
    x, down = torch.randn(17, 192).half(), torch.randn(16, 192).half() / 14
    x[5, 70] = bad
    args = (x, torch.ones(192), down, INT8)
    (qx, sx, _), (want_qx, want_sx, _) = run(ops.quantize_act, device, *args), ops.quantize_act.reference(*args)
    assert torch.equal(qx, want_qx) and sx.isnan().nonzero().tolist() == want_sx.isnan().nonzero().tolist() == [[5]]
    more, spec = ended("_gelu_quantize", 17, 128, 192, torch.float16)
    linear = (qx, sx, *operands(17, 128, 192, 16, torch.float16)[2:], *more, spec)
    _, scales, _ = run(ops.linear_w4a8_gelu_quantize, device, *linear)
    assert scales.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("fmt", [INT4, NVFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_expanding_gives_the_integers_of_the_fold(device: str, fmt, dtype: torch.dtype) -> None:
    """As all the columns of an identity: y = w8·s_ch, exactly."""
    torch.manual_seed(3)
    n, k = 48, 192
    w = torch.randn(n, k) * torch.rand(n, k // 16).repeat_interleave(16, 1).exp()
    w[5] = 0
    weight = QTensor.quantize(w, fmt, scale_dtype=dtype)
    if fmt is INT4:
        weight.codes[7, :3] = 0x88  # −8, which files of others may have
    w8, row_scales = weight.fold_int8()
    aux = torch.cat([row_scales, *([] if weight.channel_scale is None else [weight.channel_scale])])
    unit = torch.eye(k, dtype=torch.int8)
    tensors = (unit, torch.ones(k), weight.codes, weight.scales, aux, torch.empty(k, 0), torch.empty(n, 0).to(dtype),
               torch.zeros(n))
    spec = LinearSpec(fmt.name, fmt.group, k, INT8, row_scales=True)
    want = (w8.float() * row_scales.unsqueeze(1)).T.to(dtype)
    assert torch.equal(run(ops.linear_w4a8, device, *tensors, spec), want)


@pytest.mark.usefixtures("as_turing")
@pytest.mark.parametrize("suffix", ENDINGS)
def test_an_rtx_20_runs_every_ending_in_float16(suffix: str) -> None:
    more, spec = ended(suffix, 70, 384, 192, torch.float16)
    op, args = ops.OPS[f"linear_w4a8{suffix}"], (*operands(70, 384, 192, 48, torch.float16), *more, spec)
    assert_as_the_reference(op, op(*args), args)
    refused = ops.linear_w4a8.explain(*operands(4, 32, 64, 16), LinearSpec("int8", 0, 64, INT8))["cuda"]
    assert "capability 7.5 multiplies no bfloat16" in refused


@pytest.mark.parametrize(("change", "said"), [
    (dict(k=96), "whole groups of 64, not 96"), (dict(n=24), "multiples of 16, not 24"),
    (dict(dtype=torch.float32), "bfloat16 or float16, not float32")])
def test_what_the_kernels_do_not_take_runs_elsewhere_and_is_explained(device: str, change: dict, said: str) -> None:
    sizes = {"m": 4, "n": 32, "k": 64, "r": 16, "dtype": torch.bfloat16, **change}
    args = (*operands(**sizes), LinearSpec("int8", 0, sizes["k"], INT8))
    assert said in ops.linear_w4a8.explain(*(t.to(device) if isinstance(t, Tensor) else t for t in args))["cuda"]
    torch.testing.assert_close(run(ops.linear_w4a8, device, *args), ops.linear_w4a8.reference(*args))


def test_no_rows(device: str) -> None:
    for suffix in ENDINGS:
        more, spec = ended(suffix, 4, 384, 64, torch.bfloat16)
        args = [t[:0] if t.shape[:1] == (4,) else t for t in (*operands(4, 384, 64, 16), *more)]
        if suffix == "_qkv_rope":
            args[-1] = more[-1]
        one = partial(run, ops.OPS[f"linear_w4a8{suffix}"], device)(*args, spec)
        assert (one if isinstance(one, Tensor) else one[0]).shape[0] == 0


def test_tiles_on_hopper(on_hopper: ModuleType) -> None:
    """Wide ones where there is work for all clusters, narrower ones where that leaves fewer idle."""
    places = 132  # an H100's multiprocessors, two to a cluster

    def chosen(*sizes: tuple[int, int], whole_heads: bool = False) -> int:
        return on_hopper.choose_sm90(list(sizes), places, whole_heads)

    assert chosen((4608, 9216)) == chosen((4608, 12288)) == 256
    assert chosen((4608, 3072)) == 192  # 288 items for 66 clusters, against 216
    assert chosen((4608, 3072), whole_heads=True) in (128, 256)
    assert chosen((256, 3072)) == 128 == chosen((1, 3072))
    assert chosen((4096, 3072), (512, 3072)) == 192  # the text of a block beside its image


@pytest.mark.usefixtures("as_hopper")
def test_code_of_a_generation_is_not_taken_for_hoppers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no kernel: results would be what memory held."""
    args = (*operands(4, 32, 64, 16), LinearSpec("int8", 0, 64, INT8))
    assert ops.linear_w4a8.explain(*args)["cuda"] == "can run"
    monkeypatch.setattr(native.module, "cuda_targets", "80;90")
    gpu.refuses_capability.cache_clear()
    assert "needs the target 90a, and it was built for 80, 90" in ops.linear_w4a8.explain(*args)["cuda"]
