"""What is counted of models without data is what quantized ones hold."""
from __future__ import annotations

import pytest

import nunchaku_py as nq
from benchmarks import shapes, tables
from tests.tiny import MODELS
from tests.tiny_models import flux_config


def test_counted_bytes_are_those_of_a_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.CONFIGS, "flux", ("FluxTransformer2DModel", flux_config()))
    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    counted = tables.sizes(tables.quantized("flux", "rtn-int4"), steps=10, prompts=2)
    assert counted == tables.sizes(model, steps=10, prompts=2)
    assert counted.stored == sum(parameter.nbytes for parameter in model.parameters())
    assert counted.table == 2 * 10 * sum(128 * 2 * count for count in (6, 6, 6, 6, 3, 3))


def test_flux_fits_beside_its_tables() -> None:
    counted = tables.sizes(tables.quantized("flux"), steps=28, prompts=1)
    assert counted.resident < 4.7 * tables.GIB < counted.stored
    assert "modulation tables" in tables.table("FLUX.1", counted)
