"""Whole models on Triton's kernels, files of both formats, every mode, with every block's linears run together."""
from __future__ import annotations

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.backends.cuda import device as cuda
from nunchaku_py.linear import QuantizedSite
from tests.simt.test_native_nvfp4 import linear
from tests.simt.test_sites import output
from tests.tiny_models import MODELS

SITES = {"quantize_act", "linear_w4a4", "linear_w4a8", "linear_w4a16"}


@pytest.mark.parametrize("name, recipe, mode, weights", [
    ("flux", "svdquant-int4", "a8", "int8"), ("flux", "svdquant-nvfp4", "a8", "int4"),
    ("flux", "svdquant-int4", "a4", "auto"), ("flux", "svdquant-nvfp4", "a4", "auto"),
    ("sdxl", "svdquant-int4", "a16", "auto")])
@pytest.mark.parametrize("where", ["as_blackwell", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_whole_model_runs_on_the_kernels(name: str, recipe: str, mode: str, weights: str, where: str,
                                           request: pytest.FixtureRequest) -> None:
    """What differs is rounded otherwise: a small part of what 4 bits cost, unless inputs further on are quantized to 4
    bits, which it may decide. What they cost is the same."""
    model, inputs = MODELS[name]()
    exact = output(model, inputs, "cpu")
    nq.quantize(model, recipe, rank=16, mode=mode, progress=False)
    with nq.backend("torch"):
        want = output(model, inputs, "cpu")
    for site in model.modules():
        if isinstance(site, QuantizedSite):
            site._unpack()
    if where != "gpu":
        request.getfixturevalue(where)
    device = "cuda" if where == "gpu" else "cpu"
    with nq.backend("triton"):
        model = model.to(device)
        nq.set_weights(model, weights)
        got = output(model, inputs, device)
        found = nq.explain(model)
    assert {one.op for one in found} <= SITES and {one.backend for one in found} == {"triton"}
    if mode == "a8":
        assert all(("int8 x int8" in one.call) == (weights == "int8") for one in found if "int8 x" in one.call)
    cost = (want - exact).norm().item()
    assert (got - exact).norm().item() == pytest.approx(cost, rel=0.05)
    assert (got - want).norm() < (1 if mode == "a4" else 0.3) * cost


def test_a_backend_asked_for_serves_compiled_models(as_blackwell: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, which cannot look who is asked for, leaves a site as it was packed."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "capability_of", lambda device: (12, 0))
    with nq.backend("triton"):
        site = linear(64, 128)
        site.ensure_packed(torch.bfloat16)
        packed = site.packed
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        site.ensure_packed(torch.bfloat16)
    assert site.packed is packed and packed.residency == "codes"
