"""Projections that share an input quantize it once, and give the bits they give apart."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import nunchaku_py as nq
from nunchaku_py import ops
from nunchaku_py.models.flux_processor import SharedInputProcessor
from nunchaku_py.together import apply_together, share_input
from tests.tiny import MODELS


@pytest.fixture(scope="module")
def flux():
    model, inputs = MODELS["flux"]()
    nq.quantize(model)
    return model, inputs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    dispatch = ops.quantize_act.dispatch
    monkeypatch.setattr(ops.quantize_act, "dispatch", lambda *args: (counted.append(1), dispatch(*args))[1])
    return counted


def run(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def test_flux_quantizes_attention_inputs_once_and_keeps_the_bits(flux: tuple, calls: list[int]) -> None:
    model, inputs = flux
    together = run(model, inputs)
    shared = len(calls)
    apart = copy.deepcopy(model)
    attentions = [module for module in apart.modules() if hasattr(module, "processor")]
    for module in attentions:
        module.set_processor(FluxAttnProcessor())
    calls.clear()
    assert torch.equal(run(apart, inputs), together)
    text_too = sum(module.added_kv_proj_dim is not None for module in attentions)
    assert len(calls) - shared == 2 * len(attentions) + 2 * text_too, "two of three quantizations saved per input"


def test_other_processors_and_fused_projections_are_left_alone(flux: tuple) -> None:
    model, _ = flux
    assert all(type(block.attn.processor) is SharedInputProcessor for block in model.transformer_blocks)
    dense, _ = MODELS["flux"]()
    mine = FluxAttnProcessor()
    mine.__class__ = type("Custom", (FluxAttnProcessor,), {})
    dense.transformer_blocks[0].attn.set_processor(mine)
    nq.quantize(dense)
    assert type(dense.transformer_blocks[0].attn.processor).__name__ == "Custom"


def test_sharing_stops_where_a_member_is_hooked_or_differs(flux: tuple) -> None:
    attention = copy.deepcopy(flux[0]).transformer_blocks[0].attn
    members = [attention.to_q, attention.to_k, attention.to_v]
    assert share_input(members)
    seen: list[str] = []
    handle = attention.to_k.register_forward_hook(lambda *_: seen.append("to_k"))
    assert not share_input(members)
    apply_together(members, torch.randn(1, 3, attention.to_q.in_features).bfloat16())
    assert seen == ["to_k"], "a hooked member is called as a module"
    handle.remove()
    attention.to_v.set_mode("a16")
    assert not share_input(members), "modes differ"
    attention.to_v.set_mode("auto")
    attention.to_v.set_tensor("smooth", attention.to_v.smooth.data * 2)
    assert not share_input(members), "smooth factors differ"


def test_other_backend_settings_survive(flux: tuple) -> None:
    dense, _ = MODELS["flux"]()
    dense.transformer_blocks[0].attn.processor._attention_backend = "native"
    nq.quantize(dense)
    assert dense.transformer_blocks[0].attn.processor._attention_backend == "native"
