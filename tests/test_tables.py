"""Modulation tables: the same bits with and without them, in models and in pipelines; nothing that is not in a table is
ever taken for it."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import nn

import nunchaku_py as nq
from nunchaku_py.demo import shipped
from nunchaku_py.tables import modulation_linears, store
from nunchaku_py.tables.foresee import tables_of
from tests.checks import run, same_bits
from tests.tabled import STEPS, agree, counted, draw, flux, quantized_model, quantized_pipeline, qwen_image, sd3, tables
from tests.tiny import MODELS, PIPELINES
from tests.tiny_models import DTYPE, POOLED, TEXT, TEXT_DIM, normal, randomise

WITH_TABLES = {"flux": 6, "sd3": 6, "qwen_image": 4, "z_image": 3, "cogvideox": 4}  # case → its modulation linears


def test_threads_may_share_a_model() -> None:
    model, inputs = quantized_model()
    calls = [inputs | {"timestep": torch.full((1,), 0.1 * i, dtype=DTYPE)} for i in range(8)]
    before = [run(model, one) for one in calls]
    nq.cache_modulation(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: run(model, one), calls * 3))
    assert all(map(same_bits, found, before * 3))
    assert sum(counted(tables(model))) == 24 * 6


# ------------------------------------------------------------------------------------------------------------ same bits
@pytest.mark.parametrize("case", WITH_TABLES)
def test_a_model_gives_the_same_bits(case: str) -> None:
    model, inputs = quantized_model(case)
    before = run(model, inputs)
    nq.cache_modulation(model)
    assert same_bits(run(model, inputs), before) and same_bits(run(model, inputs), before)
    assert counted(tables(model)) == (WITH_TABLES[case], WITH_TABLES[case], 0)


@pytest.mark.parametrize(("build", "calls"), [(flux, 1), (qwen_image, 2), (sd3, 1)])
def test_a_pipeline_draws_the_same_bits_and_every_step_is_foreseen(build: Callable, calls: int) -> None:
    pipe, arguments = build()
    nq.quantize(pipe.transformer, "rtn-int4")
    before = draw(pipe, arguments)
    nq.cache_modulation(pipe)
    assert same_bits(draw(pipe, arguments), before)
    found, linears = tables(pipe.transformer), len(modulation_linears(pipe.transformer))
    assert counted(found)[:2] == (calls * STEPS * linears, 0)
    assert found.counts.foreseen == len(found.order) * linears  # of each of them once


def test_the_shipped_pipeline_draws_the_same_bits() -> None:
    pipe = shipped.pipeline("tiny-flux")
    nq.quantize(pipe.transformer, "rtn-int4")
    arguments = shipped.CALLS["tiny-flux"] | {"prompt": "a red circle", "output_type": "pt"}
    before = draw(pipe, arguments)
    nq.cache_modulation(pipe)
    assert same_bits(draw(pipe, arguments), before)
    assert counted(tables(pipe.transformer)) == (2 * STEPS * 4, 0, 2)  # it has a second prompt


def test_a_batch_of_rows_would_round_otherwise() -> None:
    """Why rows of a schedule are computed by calls of the model's own size: the premise may fall with other kernels."""
    torch.manual_seed(0)
    model, _ = quantized_model()
    linear = model.transformer_blocks[0].norm1.linear
    x = torch.randn(28, 128)
    with torch.no_grad():
        one_by_one = torch.cat([linear(row) for row in x.split(1)])
        assert (linear(x) - one_by_one).abs().max() < 1e-4 * one_by_one.abs().max()


# ----------------------------------------------------------------------------------------------- nothing wrong is found
@pytest.mark.parametrize("change", [
    {"num_inference_steps": 3}, {"guidance_scale": 7.0}, {"pooled_prompt_embeds": normal(1, POOLED, seed=8)},
    {"prompt_embeds": normal(2, TEXT, TEXT_DIM), "pooled_prompt_embeds": normal(2, POOLED)},
    {"sigmas": [1.0, 0.7, 0.2]}])
def test_another_call_is_computed_anew(change: dict) -> None:
    pipe, arguments, found = quantized_pipeline()
    draw(pipe, arguments)
    assert agree(pipe, arguments, **change)
    assert counted(found)[1:] == (0, 2)  # foreseen too, once for each


def test_another_prompt_with_the_same_pooled_one_is_found() -> None:
    pipe, arguments, found = quantized_pipeline()
    draw(pipe, arguments)
    assert agree(pipe, arguments, prompt_embeds=normal(1, TEXT, TEXT_DIM, seed=9))
    assert counted(found)[1:] == (0, 1)


def test_image_to_image_begins_within_the_schedule() -> None:
    pipe, arguments = PIPELINES["flux_img2img"]()
    nq.quantize(pipe.transformer, "rtn-int4")
    nq.cache_modulation(pipe)
    assert agree(pipe, arguments, strength=0.6)
    assert counted(tables(pipe.transformer))[1:] == (0, 1) and len(tables(pipe.transformer).order) == 3


def test_dtypes_and_backends_do_not_share() -> None:
    model, inputs = quantized_model()
    nq.cache_modulation(model)
    linear = model.transformer_blocks[0].norm1.linear
    x = torch.zeros(1, 128)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):  # zeros have the same bytes
            assert linear(x.to(dtype)).dtype == dtype
        assert linear(x[:, :64].repeat(1, 2)).dtype == torch.float32
        with nq.backend("torch"):
            linear(x)
    assert counted(tables(model)) == (0, 4, 0)


def test_a_written_output_is_computed_again() -> None:
    model, _ = quantized_model()
    nq.cache_modulation(model)
    linear, x = model.transformer_blocks[0].norm1.linear, normal(1, 128)
    with torch.no_grad():
        expected = linear(x).clone()
        linear(x).add_(1)
        assert same_bits(linear(x), expected)
        x.mul_(2)  # in place: it is no longer the tensor that was seen
        assert not same_bits(linear(x), expected)


def test_changed_weights_are_noticed() -> None:
    model, inputs = quantized_model()
    nq.cache_modulation(model)
    run(model, inputs)
    other, _ = MODELS["flux"]()
    for parameter in other.parameters():
        parameter.data.neg_()
    nq.quantize(other, "rtn-int4")
    model.load_state_dict(other.state_dict())
    assert same_bits(run(model, inputs), run(other, inputs))
    linear = model.transformer_blocks[0].norm1.linear
    linear.set_tensor("scales", linear.scales.data * 2)
    other.transformer_blocks[0].norm1.linear.set_tensor("scales", linear.scales.data.clone())
    assert same_bits(run(model, inputs), run(other, inputs))


def test_loras_on_modulation_linears_are_noticed() -> None:
    """Loaded, of another strength, off, on, and gone: each draws what it draws without tables."""
    pipe, arguments, found = quantized_pipeline()
    plain = draw(pipe, arguments)
    model = pipe.transformer
    model.add_adapter(LoraConfig(r=4, target_modules=["norm1.linear", "norm.linear"], init_lora_weights=False), "one")
    images = [plain]
    for change in (lambda: None, lambda: model.set_adapters("one", 0.5), model.disable_adapters, model.enable_adapters):
        change()
        assert agree(pipe, arguments)
        images.append(draw(pipe, arguments))
    assert len({image.sum().item() for image in images}) == 3  # without it, and at two strengths
    assert agree(pipe, arguments, joint_attention_kwargs={"scale": 0.3})
    model.delete_adapters("one")
    assert same_bits(draw(pipe, arguments), plain)
    assert len(modulation_linears(model)) == 6


def test_modes_and_fusion_change_nothing() -> None:
    pipe, arguments, _ = quantized_pipeline()
    for change in (lambda: nq.set_mode(pipe, "a16"), lambda: nq.set_fusion(pipe, False),
                   lambda: nq.set_mode(pipe, "a8")):
        change()
        assert agree(pipe, arguments)


def test_gradients_and_many_rows_pass_by() -> None:
    model, _ = quantized_model()
    nq.cache_modulation(model)
    linear = model.transformer_blocks[0].norm1.linear
    x = torch.randn(2, 128, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        linear(torch.randn(store.MOST_ROWS + 1, 128))
    assert counted(tables(model)) == (0, 0, 0)


def test_inference_mode_and_autocast() -> None:
    model, inputs = quantized_model()
    with torch.inference_mode():
        before = model(**inputs)[0]
        nq.cache_modulation(model)
        for _ in range(2):
            assert same_bits(model(**inputs)[0], before)
    assert counted(tables(model)) == (6, 6, 0)
    linear, x = model.transformer_blocks[0].norm1.linear, torch.randn(1, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == linear(x).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- what is not foreseen
def test_steps_that_cannot_be_known_are_computed_as_they_come() -> None:
    pipe, arguments = flux()
    model = pipe.transformer
    nq.quantize(model, "rtn-int4")
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"timestep": 0.9 * kwargs["timestep"]}), with_kwargs=True)
    nq.cache_modulation(pipe)
    assert agree(pipe, arguments) and counted(tables(model)) == (0, STEPS * 6, 0)
    assert "is none of the scheduler's" in tables(model).foresight.why_not
    handle.remove()
    handle = model.transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert agree(pipe, arguments, guidance_scale=5.0) and counted(tables(model)) == (0, 2 * STEPS * 6, 0)
    assert "transformer_blocks.0 has a hook" in tables(model).foresight.why_not
    handle.remove()
    assert agree(pipe, arguments, guidance_scale=6.0) and counted(tables(model)) == (STEPS * 6, 2 * STEPS * 6, 1)


def test_a_guess_that_never_comes_true_is_given_up() -> None:
    """The embedding heeds more than the timestep: what is computed ahead is for nothing, but only so often."""
    pipe, arguments, found = quantized_pipeline()
    count = iter(range(10**6))
    embed = pipe.transformer.time_text_embed
    own = embed.forward
    embed.forward = lambda *args: own(*args) + next(count)
    draw(pipe, arguments, num_inference_steps=20)
    assert counted(found)[2] < 8 and "with more than the timestep" in found.foresight.why_not
    assert counted(found)[1] > 12 * 6


def test_strengths_that_change_in_every_step_are_not_foreseen_again_and_again() -> None:
    """A strength in the call is set before it and taken back after it: tables are void each time."""
    pipe, arguments, found = quantized_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["norm1.linear", "norm.linear"],
                                            init_lora_weights=False), "one")
    draw(pipe, arguments, num_inference_steps=12)
    assert counted(found)[1:] == (0, 1)
    strength = {"joint_attention_kwargs": {"scale": 0.3}}
    assert agree(pipe, arguments, num_inference_steps=12, **strength)
    assert counted(found)[2] == 2 and "more than the timestep" in found.foresight.why_not
    assert agree(pipe, arguments, num_inference_steps=12)  # a run without: foreseen as before
    assert counted(found)[2] == 3 and counted(found)[1] <= 12 * 6


@dataclass
class _Pipeline:
    scheduler: Any
    components: dict[str, nn.Module]


PASSED = {  # what pipelines of diffusers make of a timestep, t a tensor without dimensions
    "FLUX.1": lambda t: t.expand(1).to(DTYPE) / 1000, "AuraFlow": lambda t: torch.tensor([t / 1000]).to(DTYPE),
    "SD3": lambda t: t.expand(1), "Z-Image": lambda t: (1000 - t.expand(1)) / 1000,
    "Lumina2": lambda t: (1 - t / 1000).expand(1)}


@pytest.mark.parametrize("passed", PASSED)
def test_what_pipelines_pass_is_foreseen(passed: str) -> None:
    model, inputs = quantized_model()
    pipe = _Pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), {"transformer": model})
    pipe.scheduler.set_timesteps(STEPS)
    nq.cache_modulation(pipe)
    for step in pipe.scheduler.timesteps:
        run(model, inputs | {"timestep": PASSED[passed](step)})
    hits, misses, schedules = counted(tables(model))
    assert hits == STEPS * 6 and misses == 0
    assert schedules <= 2  # timesteps that look alike at the first step may differ at the second


def test_whole_numbers_are_foreseen() -> None:
    model, inputs = quantized_model("cogvideox")
    pipe = _Pipeline(CogVideoXDDIMScheduler(), {"transformer": model})
    pipe.scheduler.set_timesteps(STEPS)
    nq.cache_modulation(pipe)
    for step in pipe.scheduler.timesteps:
        run(model, inputs | {"timestep": step.expand(1)})
    assert counted(tables(model)) == (STEPS * 4, 0, 1)


def hunyuan_video() -> tuple[nn.Module, dict]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=64, num_layers=2,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=TEXT_DIM, pooled_projection_dim=POOLED, rope_axes_dim=(16, 24, 24))
    inputs = dict(hidden_states=normal(1, 16, 1, 8, 8), encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
                  encoder_attention_mask=torch.ones(1, TEXT), pooled_projections=normal(1, POOLED),
                  guidance=torch.tensor([3500.0]), return_dict=False)
    return randomise(model), inputs


def test_linears_that_read_something_else_have_schedules_of_their_own() -> None:
    """HunyuanVideo's text refiner reads another embedding than its blocks. In its first call that is found out: what
    had been computed for the blocks is not what they read; from the second call on both are foreseen."""
    model, inputs = hunyuan_video()
    nq.quantize(model, "rtn-int4")
    pipe = _Pipeline(FlowMatchEulerDiscreteScheduler(), {"transformer": model})
    pipe.scheduler.set_timesteps(STEPS)
    steps = [inputs | {"timestep": step.expand(1).to(DTYPE)} for step in pipe.scheduler.timesteps]
    before = [run(model, one) for one in steps]
    nq.cache_modulation(pipe)
    assert all(same_bits(run(model, one), y) for one, y in zip(steps, before, strict=True))
    blocks, refiner = 2 * 2 + 1, 1
    assert counted(tables(model)) == ((STEPS - 1) * blocks + STEPS * refiner, blocks, 2)
    other = [one | {"pooled_projections": -inputs["pooled_projections"]} for one in steps]
    for one in other:
        run(model, one)
    assert counted(tables(model))[1:] == (blocks, 3)  # the refiner does not read it


def test_the_limit_is_kept() -> None:
    pipe, arguments = flux()
    nq.quantize(pipe.transformer, "rtn-int4")
    row = sum(linear.out_features * 2 for linear in modulation_linears(pipe.transformer).values())
    for limit, kept in ((4 * row, 4), (0, 1)):  # one is in use
        nq.cache_modulation(pipe, limit=limit)
        assert agree(pipe, arguments, num_inference_steps=12)
        found = tables(pipe.transformer)
        assert found.bytes == kept * row and len(found.order) == kept
        assert found.bytes == sum(table.nbytes() for _, table in tables_of(pipe.transformer))


def test_an_interruption_leaves_tables_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C just after an output has come into the table."""
    pipe, arguments, found = quantized_pipeline()
    compute = store.LinearTable.compute

    def interrupted(*given: Any, **more: Any) -> None:
        compute(*given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.LinearTable, "compute", interrupted)
        draw(pipe, arguments)
    assert agree(pipe, arguments) and found.counts.hits
    for linear in modulation_linears(pipe.transformer).values():
        linear.bias.add_(1)
    assert agree(pipe, arguments)
    assert found.bytes == sum(table.nbytes() for _, table in tables_of(pipe.transformer))
