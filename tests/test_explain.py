"""nq.explain says, for a quantized model, what runs where and why."""

import pytest

import nunchaku_py as nq
from nunchaku_py import ops
from tests.tiny import MODELS


@pytest.fixture(scope="module")
def model():
    model, _ = MODELS["pixart"]()
    nq.quantize(model)
    return model


def test_every_distinct_call_is_explained(model) -> None:
    found = nq.explain(model)
    assert {e.op for e in found} == {"quantize_act", "linear_w4a8"}
    sites = sum(1 for m in model.modules() if isinstance(m, nq.QuantLinear))
    assert sum(e.sites for e in found if e.op == "linear_w4a8") == sites
    for e in found:
        assert e.backend in ("cpu", "torch") and {"cuda", "triton"} <= set(e.refusals) <= {"cuda", "triton", "cpu"}
        assert ("cpu" in e.refusals) == (e.backend == "torch")
        triton = "the tensors are on cpu" if e.op == "quantize_act" else "not built"
        assert f"runs on {e.backend} — cuda: the tensors are on cpu; triton: {triton}" in str(e)
    assert "quantize_act (64x" in str(found)


def test_a_backend_that_takes_the_call_is_named(model, monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.quantize_act
    monkeypatch.setattr(op, "backends", dict(op.backends))
    op.backend("cpu", refuses=lambda *args: "only on Sundays")(op.reference)
    assert {e.refusals["cpu"] for e in nq.explain(model) if e.op == "quantize_act"} == {"only on Sundays"}
    op.backend("cpu")(op.reference)
    assert {e.backend for e in nq.explain(model) if e.op == "quantize_act"} == {"cpu"}


def test_a_model_without_quantized_linears_has_nothing_to_explain() -> None:
    with pytest.raises(nq.NunchakuError, match="holds no quantized linears"):
        nq.explain(MODELS["pixart"]()[0])
