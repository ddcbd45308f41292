"""Quantized linears and whole models on the CUDA backend: what is packed, when, and that models run on it."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import nunchaku_py as nq
from nunchaku_py.chain import GELU, no_ending
from nunchaku_py.explain import _explain_site
from nunchaku_py.linear import QuantizedSite, QuantLinear
from nunchaku_py.lora.branch import InputGroup
from nunchaku_py.ops import backend
from nunchaku_py.site import Site
from nunchaku_py.tensor import QTensor
from tests.lora.test_branch import adapter, assert_added, give
from tests.lora.toys import normal
from tests.models.test_flux_blocks import arguments, call
from tests.tiny_models import MODELS


@pytest.mark.parametrize("name", ["flux", "sdxl"])
@pytest.mark.parametrize("where", ["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_whole_model_runs_on_the_kernels(name: str, where: str, request: pytest.FixtureRequest) -> None:
    """Its fused blocks too. What rounds otherwise quantizes otherwise, so outputs differ by a part of what 4 bits cost;
    what they cost is the same."""
    model, inputs = MODELS[name]()
    exact = output(model, inputs, "cpu")
    nq.quantize(model, "svdquant-int4", rank=16, mode="a4", progress=False)
    want = output(model, inputs, "cpu")
    for site in model.modules():
        if isinstance(site, QuantizedSite):
            site._unpack()
    if where == "host":
        request.getfixturevalue("as_gpu")
    got = output(model, inputs, "cuda" if where == "gpu" else "cpu")
    runs = {(one.op, one.backend) for one in nq.explain(model) if "int4 x int4" in one.call}
    assert runs == {("quantize_act", "cuda"), ("linear_w4a4", "cuda")}
    cost = (want - exact).norm().item()
    assert (got - exact).norm().item() == pytest.approx(cost, rel=0.05) and (got - want).norm() < cost


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict, device: str) -> Tensor:
    there = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    return model.to(device)(**there)[0].float().cpu()


def linear(n: int, k: int) -> QuantLinear:
    """A quantized linear of random numbers in bf16, in a4."""
    torch.manual_seed(n + k)
    module = QuantLinear(Site("w4a4", "int4", 64, 16), k, n, True, torch.bfloat16)
    weight = QTensor.quantize(torch.randn(n, k) / k**0.5, module.site.weight_format)
    for name, tensor in {"codes": weight.codes, "scales": weight.scales, "smooth": torch.ones(k).bfloat16(),
                         "down": torch.randn(16, k).bfloat16() / 30, "up": torch.randn(n, 16).bfloat16() / 30,
                         "bias": torch.randn(n).bfloat16()}.items():
        module.set_tensor(name, tensor)
    module.set_mode("a4")
    return module


@pytest.mark.usefixtures("as_gpu")
def test_rows_of_another_type_pack_the_site_for_them() -> None:
    """Float16 has these scales too; float32 rows run on the reference, as no kernel takes them; and so back."""
    module, x = linear(64, 128), torch.randn(5, 128)
    exact = x @ module.effective_weight().T + module.bias.float()
    for dtype, residency in ((torch.bfloat16, "mma"), (torch.float16, "mma"), (torch.float32, "codes"),
                             (torch.bfloat16, "mma")):
        y = module(x.to(dtype))
        assert y.dtype == dtype and module.packed.residency == residency
        assert (y.float() - exact).norm() <= 0.2 * exact.norm()
    with backend("torch"):
        module(x.bfloat16())
        assert module.packed.residency == "codes"
        assert "the backend 'torch' is asked for" in module.why_not_mma()
    module(x.bfloat16())
    assert module.packed.residency == "mma" and copy.deepcopy(module)(x.bfloat16()).isfinite().all()
    assert set(module.state_dict()) == {"codes", "scales", "smooth", "down", "up", "bias"}


@pytest.mark.usefixtures("as_gpu")
def test_a_cast_packs_for_what_it_computes_in() -> None:
    """Before any row has come: what is compiled next finds it packed."""
    module = linear(64, 128)
    assert module.mma_scales.dtype == torch.bfloat16
    module.to(torch.float16)
    module.set_mode("a4")
    assert module.packed.dtype == module.mma_scales.dtype == torch.float16


@pytest.mark.usefixtures("as_gpu")
def test_a_reader_that_is_packed_otherwise_takes_no_ending() -> None:
    first, alike, other = linear(128, 64), linear(64, 128), linear(24, 128)  # 24 channels are none of the kernels'
    assert no_ending(first, GELU, alike) is None
    assert no_ending(first, GELU, other) == "it is packed as 'mma', and the linear that reads its output as 'row'"


@pytest.mark.usefixtures("as_gpu")
def test_a_block_called_in_another_type_looks_at_what_that_packs() -> None:
    """A projection whose scales float16 does not hold: the block steps aside at the first such call too."""
    model, _ = MODELS["flux"]()
    nq.quantize(model, "svdquant-int4", rank=16, mode="a4", progress=False)
    block, inputs = model.transformer_blocks[0], arguments()
    block.attn.to_k.scales.data[0, 0] = 2.0**-30
    for site in block.modules():
        if isinstance(site, QuantizedSite):
            site._unpack()
    call(block, *inputs)
    half = tuple(tensor.half() for tensor in inputs)
    assert torch.equal(call(block, *half), call(block, *half))


@pytest.mark.usefixtures("as_gpu")
def test_explain_says_why_a_site_is_not_packed_for_the_kernels() -> None:
    odd = linear(24, 128)
    for said in _explain_site(odd, 1, 4):
        assert said.refusals["cuda"] == "it takes output channels in multiples of 16, not 24"


@pytest.mark.usefixtures("as_gpu")
@torch.no_grad()
@pytest.mark.parametrize("ranks", [(5, 0), (16, 40), (0, 3)])
def test_adapters_are_rank_to_the_kernels(ranks: tuple[int, int]) -> None:
    """Two linears that share an input, packed for the kernels, each with the adapters it has."""
    first, second = linear(96, 128), linear(64, 128)
    for name in ("smooth", "down"):
        second.set_tensor(name, first._parameters[name].data)
    second.set_mode("a4")
    InputGroup.of([first, second])
    x = normal(70, 128, seed=3, size=1.0)
    before = [one(x) for one in (first, second)]
    held = [[adapter(one.rows_out, 128, rank, 10 * rank, 0.5)] if rank else []
            for one, rank in zip((first, second), ranks, strict=True)]
    for one, adapters in zip((first, second), held, strict=True):
        give(one, *adapters)
    assert first.packed.residency == "mma"
    quantized = first.quantize_input(x)
    for one, adapters, y in zip((first, second), held, before, strict=True):
        after = one.multiply(quantized, x.dtype)
        if adapters:
            assert_added(y, after, x, *adapters)
        else:
            assert torch.equal(after, y)


def int8_linear(fmt: str, n: int, k: int) -> QuantLinear:
    torch.manual_seed(n + k)
    group = 64 if fmt == "int4" else 16
    module = QuantLinear(Site("w4a4", fmt, group, 16), k, n, True, torch.bfloat16)
    weight = QTensor.quantize(torch.randn(n, k) / k**0.5, module.site.weight_format)
    for name, tensor in {**weight.tensors(), "smooth": torch.ones(k).bfloat16(),
                         "down": torch.randn(16, k).bfloat16() / 30, "up": torch.randn(n, 16).bfloat16() / 30,
                         "bias": torch.randn(n).bfloat16()}.items():
        module.set_tensor(name, tensor)
    return module


@pytest.mark.usefixtures("as_gpu")
@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_a8_holds_its_weights_as_asked_and_computes_the_same(fmt: str) -> None:
    module, x = int8_linear(fmt, 64, 128), normal(70, 128, seed=3, size=1.0)
    module.set_mode("a8")
    module.set_weights("int8")
    assert module.packed.residency == "folded"
    folded = module(x)
    module.set_weights("int4")
    assert module.packed.residency == "scaled" and module.folded_codes is None
    assert torch.equal(module(x), folded)
    assert {one.backend for one in _explain_site(module, 1, 4)} == {"cuda"}
    exact = x.float() @ module.effective_weight().T + module.bias.float()
    assert (folded.float() - exact).norm() <= 0.02 * exact.norm()
    assert (module(x.float()) - exact).norm() <= 0.02 * exact.norm()  # by other kernels
    assert torch.equal(module(x), folded)
    half = module(x.half())  # the file's scales stay bfloat16
    assert {one.backend for one in _explain_site(module.half(), 1, 4)} == {"cuda"}
    assert (half.float() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.usefixtures("as_gpu")
def test_a_site_with_zeros_is_folded() -> None:
    """No kernel expands it; its INT8 weight runs on them."""
    module, x = QuantLinear(Site("w4a4", "uint4", 64), 128, 64, False, torch.bfloat16), normal(9, 128, seed=3, size=1.0)
    weight = QTensor.quantize(torch.randn(64, 128) / 8, module.site.weight_format)
    for name, tensor in {**weight.tensors(), "smooth": torch.ones(128).bfloat16()}.items():
        module.set_tensor(name, tensor)
    module.set_mode("a8")
    exact = x.float() @ module.effective_weight().T
    assert (module(x).float() - exact).norm() <= 0.02 * exact.norm()
    assert {one.backend for one in _explain_site(module, 1, 4)} == {"cuda"}


@pytest.mark.usefixtures("as_gpu")
def test_how_weights_are_held_is_checked() -> None:
    model = torch.nn.Sequential(int8_linear("int4", 64, 128))
    with pytest.raises(nq.NunchakuError, match="weights: expected 'auto', 'int8' or 'int4', got 'fp8'"):
        nq.set_weights(model, "fp8")
    nq.set_mode(model, "a8")
    for weights, residency in (("int8", "folded"), ("int4", "scaled"), ("auto", "scaled")):
        nq.set_weights(model, weights)
        assert model[0].packed.residency == residency
