"""Whole models in mode a8 on the CUDA backend, as on most GPUs and as on Hopper, files of both formats."""
from __future__ import annotations

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.linear import QuantizedSite
from tests.simt.test_sites import output
from tests.tiny_models import MODELS


@pytest.mark.parametrize("name, recipe, weights", [
    ("flux", "svdquant-int4", "int8"), ("flux", "svdquant-nvfp4", "int4"), ("sdxl", "svdquant-int4", "int4")])
@pytest.mark.parametrize("where", ["as_gpu", "as_hopper", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_whole_model_runs_on_the_kernels(name: str, recipe: str, weights: str, where: str,
                                           request: pytest.FixtureRequest) -> None:
    """The same integers: what differs from the CPU's kernels is rounded otherwise, a small part of what 4 bits cost."""
    model, inputs = MODELS[name]()
    exact = output(model, inputs, "cpu")
    nq.quantize(model, recipe, rank=16, mode="a8", progress=False)
    want = output(model, inputs, "cpu")
    for site in model.modules():
        if isinstance(site, QuantizedSite):
            site._unpack()
    if where != "gpu":
        request.getfixturevalue(where)
    model = model.to("cuda" if where == "gpu" else "cpu")
    nq.set_weights(model, weights)
    got = output(model, inputs, "cuda" if where == "gpu" else "cpu")
    kinds = [one for one in nq.explain(model) if "int8 x" in one.call]
    assert {(one.op, one.backend) for one in kinds} == {("quantize_act", "cuda"), ("linear_w4a8", "cuda")}
    assert all(("int8 x int8" in one.call) == (weights == "int8") for one in kinds)
    cost = (want - exact).norm().item()
    assert (got - exact).norm().item() == pytest.approx(cost, rel=0.05)
    assert (got - want).norm() < 0.3 * cost


def test_fused_blocks_run_on_the_kernels_too(as_hopper: None) -> None:
    model, inputs = MODELS["flux"]()
    nq.quantize(model, "svdquant-int4", rank=16, mode="a8", progress=False)
    with torch.no_grad():
        model(**inputs)
    patterns = nq.explain(model).patterns
    assert patterns and all(use.used and not use.refusals for use in patterns if "block" in use.name), patterns
