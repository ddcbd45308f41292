"""NVFP4 through the CUDA backend: ops, refusals, packing, and models. On kernels that run on the host, taken for those
of an RTX 50, and on such a GPU where there is one."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import nunchaku_py as nq
from nunchaku_py import native, ops
from nunchaku_py.backends import cuda
from nunchaku_py.backends.cuda import device as gpu
from nunchaku_py.chain import GELU, no_ending
from nunchaku_py.commands.op_samples import sample
from nunchaku_py.explain import _explain_site
from nunchaku_py.linear import QuantizedSite, QuantLinear
from nunchaku_py.ops import ActSpec
from nunchaku_py.ops.spec import MMA
from nunchaku_py.site import Site
from nunchaku_py.tensor import QTensor
from tests.simt import test_sites
from tests.simt.calls import endings, run
from tests.simt.nvfp4 import CODES, PACKED, assert_near, assert_same_quantized, bound, in_rows, operands, packed, specs
from tests.tiny_models import MODELS

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run."""
    if request.param == "host":
        request.getfixturevalue("as_blackwell")
        return "cpu"
    if torch.cuda.get_device_capability() not in gpu.NVFP4:
        pytest.skip("this GPU multiplies no NVFP4")
    return "cuda"


# ------------------------------------------------------------------------------------------------------------------ ops
of_nvfp4 = partial(endings, operands=partial(operands, branch=1 / 8), packed=packed, specs=specs, act=CODES)


def written(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors that came out, scales without what only fills their blocks."""
    if isinstance(result, Tensor) or result[0].dtype != torch.uint8:
        return (result,) if isinstance(result, Tensor) else result
    return result[0], in_rows(result[1], result[0].shape[0]).view(torch.uint8), result[2]


@DTYPES
def test_calls_in_one_launch(device: str, dtype: torch.dtype) -> None:
    """Image and text of a block, of any sizes: the reference's results, and the same bits every time."""
    for op, mma, rows in of_nvfp4(dtype):
        there = [tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args) for args in mma]
        calls = [ops.Call(op, args) for args in there]
        first, again = (tree_map_only(Tensor, Tensor.cpu, ops.together(calls)) for _ in range(2))
        for got, same, args in zip(first, again, rows, strict=True):
            want = op.reference(*args)
            if op.name.endswith("_quantize"):
                assert_same_quantized(got, want, dtype)
            else:
                for one, other in zip(written(got), written(want), strict=True):
                    assert_near(one, other)
            assert all(map(torch.equal, written(got), written(same)))


@DTYPES
@pytest.mark.parametrize("m, n, k, r", [(1, 16, 64, 0), (70, 208, 192, 24), (200, 400, 128, 32)])
def test_linear(device: str, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    args, (row, mma) = operands(m, n, k, r, dtype), specs(k)
    got, want = run(ops.linear_w4a4, device, *packed(args), mma), ops.linear_w4a4.reference(*args, row)
    assert ((got.double() - want.double()).abs() <= bound(want, args, row)).all()


@pytest.mark.parametrize("ranks", [16, 40, 150])
def test_quantizing(device: str, ranks: int) -> None:
    torch.manual_seed(0)
    x, inv_smooth = torch.randn(70, 192).bfloat16(), 0.5 + torch.rand(192)
    down = (torch.randn(ranks, 192) / 14).bfloat16()
    qx, sx, h = run(ops.quantize_act, device, x, inv_smooth, down, PACKED)
    want = ops.quantize_act.reference(x, inv_smooth, down, CODES)
    assert sx.shape == (3, 128, 4) and sx.dtype == torch.float8_e4m3fn
    assert torch.equal(qx, want[0]) and torch.equal(in_rows(sx, 70).float(), want[1].float())
    assert (h - want[2]).abs().max() <= 1e-4
    normed = [ActSpec("nvfp4", 16, norm="layer", layout=layout) for layout in (MMA, "row")]
    more = torch.ones(192).bfloat16(), torch.randn(2, 192) / 4, torch.randn(2, 192) / 4
    assert_same_quantized(run(ops.norm_modulate_quantize, device, x, *more, inv_smooth, down, normed[0]),
                          ops.norm_modulate_quantize.reference(x, *more, inv_smooth, down, normed[1]), x.dtype)


def test_no_rows(device: str) -> None:
    args, (_, mma) = operands(0, 128, 64, 16, torch.bfloat16), specs(64)
    assert run(ops.linear_w4a4, device, *packed(args), mma).shape == (0, 128)
    nothing, down = torch.empty(0, 64).bfloat16(), torch.ones(16, 64).bfloat16()
    empty = run(ops.quantize_act, device, nothing, torch.ones(64), down, PACKED)
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 32), (1, 0, 4), (0, 16)]


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("change", "said"), [
    (dict(k=96), "whole groups of 64, not 96"), (dict(n=24), "multiples of 16, not 24"),
    (dict(dtype=torch.float32), "bfloat16 or float16, not float32"),
])
def test_what_the_kernels_do_not_take_is_a_sentence(device: str, change: dict, said: str) -> None:
    sizes = {"m": 4, "n": 32, "k": 64, "r": 16, "dtype": torch.bfloat16, **change}
    args = operands(**sizes)
    with pytest.raises(nq.NunchakuError, match=said):
        run(ops.linear_w4a4, device, *args, specs(sizes["k"])[1])


@pytest.mark.parametrize(("wrong", "said"), [
    (dict(sx=torch.zeros(1, 4, 4)), r"sx: expected \(in/64, padded rows, 4\) = \(1, 64, 4\) float8_e4m3fn, got \(1, 4"),
    (dict(sw=torch.zeros(1, 64)), r"sw: expected \(in/64, padded out, 4\) = \(1, 64, 4\) float8_e4m3fn, got \(1, 64\)"),
    (dict(sx=torch.zeros(1, 64, 4).bfloat16()), r"sx: expected .* float8_e4m3fn, got \(1, 64, 4\) bfloat16"),
    (dict(aux=torch.zeros(0)), r"aux: expected channel_scale \(out\) = \(32,\) float32, got \(0,\)"),
    (dict(aux=torch.zeros(32).half()), r"aux: expected .* float32, got \(32,\) float16"),
    (dict(h=torch.zeros(3, 16)), r"h: expected \(rows, rank\) = \(4, 16\)"),
])
def test_wrong_shapes_and_types_are_sentences(device: str, wrong: dict, said: str) -> None:
    names = ("qx", "sx", "qw", "sw", "aux", "h", "up", "bias")
    args = dict(zip(names, packed(operands(4, 32, 64, 16, torch.bfloat16)), strict=True)) | wrong
    with pytest.raises(nq.NunchakuError, match=said):
        run(ops.linear_w4a4, device, *args.values(), specs(64)[1])


@pytest.mark.usefixtures("as_blackwell")
def test_formats_are_not_mixed() -> None:
    args = packed(operands(4, 64, 64, 16, torch.bfloat16))
    with pytest.raises(nq.NunchakuError, match="with nvfp4 activations its weights are nvfp4 in groups of 16"):
        ops.linear_w4a4(*args, ops.LinearSpec("int4", 64, 64, PACKED, layout=MMA))
    with pytest.raises(nq.NunchakuError, match="NVFP4 in groups of 16 or INT8, not nvfp4 in groups of 32"):
        ops.quantize_act(torch.ones(4, 64).bfloat16(), torch.ones(64), torch.ones(8, 64).bfloat16(),
                         ActSpec("nvfp4", 32, layout=MMA))
    to_int4 = ops.LinearSpec("nvfp4", 16, 64, PACKED, layout=MMA, activation="gelu_tanh",
                             next=ActSpec("int4", 64, layout=MMA))
    with pytest.raises(nq.NunchakuError, match="it goes from nvfp4 to int4"):
        ops.linear_w4a4_gelu_quantize(*args, torch.ones(64), torch.ones(8, 64).bfloat16(), to_int4)


@pytest.mark.usefixtures("as_gpu")
def test_other_gpus_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    args, (row, mma) = operands(4, 32, 64, 16, torch.bfloat16), specs(64)
    said = "a GPU of compute capability 8.9 has no instruction for NVFP4 that these kernels use"
    with pytest.raises(nq.NunchakuError, match=said):
        ops.linear_w4a4(*packed(args), mma)
    assert cuda.why_not_packed(row, 32, args[3], torch.bfloat16) == said


@pytest.mark.usefixtures("as_blackwell")
@pytest.mark.parametrize(("built", "said"), [
    ("120", "it has NVFP4 kernels where it was built for 120a or 120f, and it was built for 120"), ("120f", None),
    ("89;120a", None)])
def test_code_for_a_whole_generation_has_no_nvfp4(monkeypatch: pytest.MonkeyPatch, built: str, said: str) -> None:
    monkeypatch.setattr(native.module, "cuda_targets", built)
    gpu.refuses_capability.cache_clear()
    assert gpu.refuses_nvfp4(torch.device("cuda")) == said
    args, (row, _) = operands(4, 32, 64, 16, torch.bfloat16), specs(64)
    assert cuda.why_not_packed(row, 32, args[3], torch.bfloat16) == said


@pytest.mark.usefixtures("as_blackwell")
def test_info_asks_with_what_a_gpu_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **more: made(*args, **more))  # the GPU is this machine
    able = [name for name, op in ops.OPS.items() if op.explain(*sample(op, "nvfp4", "cuda"))["cuda"] == "can run"]
    assert able == [name for name, op in ops.OPS.items() if "cuda" in op.backends and name != "linear_w4a16"]
    assert sample(ops.linear_w4a4, "nvfp4", "cuda")[1].shape == (6, 128, 4)
    monkeypatch.setattr(gpu, "capability_of", lambda device: (8, 9))
    assert sample(ops.linear_w4a4, "nvfp4", "cuda")[-1].layout == "row"


# ----------------------------------------------------------------------------------------------------- sites and models
def linear(n: int, k: int) -> QuantLinear:
    """A quantized linear of random numbers in bf16, in a4."""
    torch.manual_seed(n + k)
    module = QuantLinear(Site("w4a4", "nvfp4", 16, 16), k, n, True, torch.bfloat16)
    weight = QTensor.quantize(torch.randn(n, k) / k**0.5, module.site.weight_format)
    for name, tensor in {"codes": weight.codes, "scales": weight.scales, "channel_scale": weight.channel_scale,
                         "smooth": torch.ones(k).bfloat16(), "down": torch.randn(16, k).bfloat16() / 30,
                         "up": torch.randn(n, 16).bfloat16() / 30, "bias": torch.randn(n).bfloat16()}.items():
        module.set_tensor(name, tensor)
    module.set_mode("a4")
    return module


@pytest.mark.usefixtures("as_blackwell")
def test_a_site_is_packed_for_rows_of_either_type() -> None:
    module, x = linear(64, 128), torch.randn(5, 128)
    exact = x @ module.effective_weight().T + module.bias.float()
    assert module.mma_scales.shape == (2, 64, 4) and module.mma_scales.dtype == torch.float8_e4m3fn
    for dtype, residency in ((torch.bfloat16, "mma"), (torch.float16, "mma"), (torch.float32, "codes"),
                             (torch.bfloat16, "mma")):
        y = module(x.to(dtype))
        assert y.dtype == dtype and module.packed.residency == residency
        assert (y.float() - exact).norm() <= 0.2 * exact.norm()
    assert set(module.state_dict()) == {"codes", "scales", "channel_scale", "smooth", "down", "up", "bias"}


@pytest.mark.usefixtures("as_blackwell")
def test_signs_of_scales_are_not_lost() -> None:
    """The instruction does not look at them: such a weight runs on the reference, and explain says why."""
    module = linear(64, 128)
    module.scales.data.view(torch.uint8)[3, 5] |= 0x80
    module._unpack()
    module.pack()
    assert module.packed.residency == "codes"
    for said in _explain_site(module, 1, 4):
        assert said.refusals["cuda"] == "its scales have signs, which the instruction for NVFP4 does not look at"


@pytest.mark.usefixtures("as_blackwell")
def test_a_reader_of_another_format_takes_no_ending() -> None:
    assert no_ending(linear(128, 64), GELU, linear(64, 128)) is None
    assert no_ending(linear(128, 64), GELU, test_sites.linear(64, 128)) == (
        "it is packed for nvfp4, and the linear that reads its output for int4")


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_a_whole_model_runs_on_the_kernels(name: str, request: pytest.FixtureRequest) -> None:
    """Its fused blocks too. What rounds otherwise quantizes otherwise, so outputs differ by a part of what 4 bits cost;
    what they cost is the same, as near as it is for an input that is a thousandth of itself away."""
    model, inputs = MODELS[name]()
    exact = test_sites.output(model, inputs, "cpu")
    nq.quantize(model, "svdquant-nvfp4", rank=16, mode="a4", progress=False)
    want = test_sites.output(model, inputs, "cpu")
    for site in model.modules():
        if isinstance(site, QuantizedSite):
            site._unpack()
    request.getfixturevalue("as_blackwell")
    got = test_sites.output(model, inputs, "cpu")
    runs = {(one.op, one.backend) for one in nq.explain(model) if "nvfp4 x nvfp4" in one.call}
    assert runs == {("quantize_act", "cuda"), ("linear_w4a4", "cuda")}
    cost = (want - exact).norm().item()
    assert (got - exact).norm().item() == pytest.approx(cost, rel=0.1) and (got - want).norm() < cost
