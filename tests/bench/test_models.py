"""Real architectures with random weights: that they are the real ones, and hold and compute what they should."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.bench import parts
from nunchaku_py.bench.held import held_bytes
from nunchaku_py.bench.inputs import inputs_of
from nunchaku_py.bench.job import BESIDE, Job
from nunchaku_py.bench.known import KNOWN
from nunchaku_py.bench.quick import CHOICES
from nunchaku_py.bench.random_models import meta_model, random_converted, random_model, random_quantized
from tests.narrow import NARROW, config_of

QUICK = CHOICES["quick-int4"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_known_by_name_has_its_published_size(name: str) -> None:
    known = KNOWN[name]
    table = {"pos_embed_max_size": 8, "sample_size": 8} if name.startswith("sd3") else {}  # of constants, slow to make
    model = meta_model({"_class_name": known.cls, **known.config, **table}, name)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1e9 * known.parameters, rel=0.01)


@pytest.mark.parametrize("name", NARROW)
@torch.no_grad()
def test_a_step_runs_in_16_bit_shared_and_in_4_bit(name: str) -> None:
    """On inputs of an image that is not square; sharing changes what is held, and no result."""
    own, shared = (random_model(meta_model(config_of(name), name), 1, share=share) for share in (False, True))
    ours = random_quantized(meta_model(config_of(name), name), QUICK, "auto")
    inputs = inputs_of(own, 128, 64, 8, KNOWN[name].batch)
    y, same, near = (first_of(model(**inputs, return_dict=False)[0]) for model in (own, shared, ours))
    assert torch.equal(y, same) and held_bytes(shared) < held_bytes(own)
    assert y.shape == near.shape and y.isfinite().all() and near.isfinite().all() and not torch.equal(y, near)


def first_of(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, (list, tuple)) else y


@torch.no_grad()
def test_copies_have_memory_of_their_own_and_are_what_quantize_makes() -> None:
    ours = random_quantized(meta_model(config_of("flux.1-dev"), ""), QUICK, "a8")
    first, second = (block.proj_mlp.codes for block in ours.single_transformer_blocks)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    other = random_model(meta_model(config_of("flux.1-dev"), ""), 1)
    nq.quantize(other, QUICK, mode="a8", progress=False)
    assert held_bytes(ours) == held_bytes(other)


def test_rules_say_which_linears_are_quantized() -> None:
    plain, fewer = (random_quantized(meta_model(config_of("flux.1-dev"), ""), QUICK, "a8", rules=rules)
                    for rules in ({}, {"*": "keep", "*.proj_mlp": "w4a4"}))
    assert held_bytes(plain) < held_bytes(fewer)
    assert not hasattr(fewer.transformer_blocks[0].attn.to_q, "codes")


def test_peers_are_given_16_bit_blocks_and_asked_as_often_as_their_work_cannot_be_copied() -> None:
    asked = []

    def convert(block: torch.nn.Module) -> torch.nn.Module:
        asked.append({tensor.dtype for tensor in block.parameters()})
        return block

    for distinct, times in ((1, 2), (0, 4)):
        asked.clear()
        random_converted(meta_model(config_of("flux.1-dev"), ""), convert, distinct)
        assert asked == times * [{torch.bfloat16}]


def test_scales_beside_a_weight_are_counted() -> None:
    """As bitsandbytes keeps them."""
    class State:
        def __init__(self, size: int, inner: State | None = None) -> None:
            self.absmax, self.state2, self.blocksize = torch.zeros(size), inner, 64

    linear = torch.nn.Linear(4, 8, bias=False)
    linear.weight.quant_state = State(3, State(2))
    assert held_bytes(linear) == 4 * (4 * 8 + 3 + 2)


@pytest.mark.parametrize(("part", "millions"), [
    (parts.LARGE, 123), (parts.LARGE_PROJECTED, 124), (parts.BIG_G, 695), (parts.t5(8), 4762), (parts.LATENT_4, 83.7),
    (parts.LATENT_16, 83.8)])
def test_parts_beside_the_denoiser_have_their_published_sizes(part: parts.Part, millions: float) -> None:
    model = parts.empty_part(part)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1e6 * millions, rel=0.01)


def test_text_encoders_and_decoder_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed = {"num_layers": 1, "d_model": 64, "d_kv": 8, "d_ff": 64, "num_heads": 2, "vocab_size": 1000}
    small = (replace(parts.t5(8), config={**parts.t5(8).config, **narrowed}),
             replace(parts.LATENT_4, config={**parts.LATENT_4.config, "block_out_channels": 4 * [32]}))
    monkeypatch.setitem(parts.PARTS, "sdxl", small)
    said: list[str] = []
    took = parts.measure_parts(Job(BESIDE, "", "sdxl", {}, 64, 64, "cpu", 1, batch=2), said.append)
    assert took["text"] > 0 and took["decoder"] > 0 and len(said) == 2 and said[0].startswith("making T5EncoderModel")
