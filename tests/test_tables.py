"""Modulation tables: the same bits with and without them, in models and in pipelines; nothing that is not in a table is
ever taken for it; weights that are away visit only for what is new."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py.demo import shipped
from nunchaku_py.tables import host, modulation_linears, store
from nunchaku_py.tables.foresee import tables_of
from nunchaku_py.tables.store import Tables
from tests.checks import differences, run, same_bits, state_of
from tests.tiny import MODELS, PIPELINES
from tests.tiny_models import POOLED, TEXT, TEXT_DIM, normal
from tests.tiny_pipelines import call, flux_call, flux_vae

WITH_TABLES = {"flux": 6, "sd3": 6, "qwen_image": 4, "z_image": 3, "cogvideox": 4}  # case → its modulation linears
STEPS = 5


# ----------------------------------------------------------------------------------------------------------- what is run
def quantized_model(case: str = "flux") -> tuple[nn.Module, dict]:
    model, inputs = MODELS[case]()
    nq.quantize(model, "rtn-int4")
    return model, inputs


def flux(**more: Any) -> tuple[Any, dict]:
    return PIPELINES["flux"]()[0], flux_call() | more


def qwen_image(**more: Any) -> tuple[Any, dict]:
    """With a second prompt: two calls of the model in every step."""
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
                                           latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    pipe = diffusers.QwenImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None,
                                       MODELS["qwen_image"]()[0])
    embeds = dict(prompt_embeds=normal(1, TEXT, TEXT_DIM), prompt_embeds_mask=torch.ones(1, TEXT, dtype=torch.long))
    negative = dict(negative_prompt_embeds=normal(1, TEXT, TEXT_DIM, seed=7),
                    negative_prompt_embeds_mask=torch.ones(1, TEXT, dtype=torch.long))
    return pipe, call(height=64, width=64, true_cfg_scale=3.0, **embeds, **negative) | more


def sd3(**more: Any) -> tuple[Any, dict]:
    """With guidance: a batch of two prompts."""
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=MODELS["sd3"]()[0], scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=flux_vae(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    embeds = dict(prompt_embeds=normal(1, TEXT, TEXT_DIM), pooled_prompt_embeds=normal(1, POOLED))
    return pipe, call(height=16, width=16, **embeds, **{f"negative_{name}": -one for name, one in embeds.items()}) | more


def draw(pipe: Any, arguments: dict, **more: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    fresh = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS}
    return pipe(**(arguments | fresh | more)).images


def quantized_pipeline(build: Callable[..., tuple[Any, dict]] = flux) -> tuple[Any, dict, Tables]:
    pipe, arguments = build()
    nq.quantize(pipe.transformer, "rtn-int4")
    nq.cache_modulation(pipe)
    return pipe, arguments, tables(pipe.transformer)


def tables(model: nn.Module) -> Tables:
    return next(table.tables for _, table in tables_of(model))


def counted(found: Tables) -> tuple[int, int, int]:
    return found.counts.hits, found.counts.misses, found.counts.schedules


@contextmanager
def without_tables(target: Any) -> Iterator[None]:
    """For a reference of the same model in the same state: the attributes are put aside, not the tables emptied."""
    aside = list(tables_of(target))
    for site, _ in aside:
        site.table = None
    try:
        yield
    finally:
        for site, table in aside:
            site.table = table


def agree(pipe: Any, arguments: dict, **more: Any) -> bool:
    """Whether the pipeline draws with tables what it draws without."""
    found = draw(pipe, arguments, **more)
    with without_tables(pipe.transformer):
        return same_bits(found, draw(pipe, arguments, **more))


# ------------------------------------------------------------------------------------------------------------- same bits
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


# ------------------------------------------------------------------------------------------------- nothing wrong is found
@pytest.mark.parametrize("change", [
    {"num_inference_steps": 3}, {"guidance_scale": 7.0}, {"pooled_prompt_embeds": normal(1, POOLED, seed=8)},
    {"prompt_embeds": normal(2, TEXT, TEXT_DIM), "pooled_prompt_embeds": normal(2, POOLED)}, {"sigmas": [1.0, 0.7, 0.2]}])
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
    from peft import LoraConfig

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


# --------------------------------------------------------------------------------------------------- what is not foreseen
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
    assert counted(found)[2] < 8 and "does not follow from the timestep" in found.foresight.why_not
    assert counted(found)[1] > 12 * 6


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


# ------------------------------------------------------------------------------------------------------ on, off, and copies
def test_off_is_as_before() -> None:
    model, inputs = quantized_model()
    before, keys = run(model, inputs), {name: set(vars(module)) for name, module in model.named_modules()}
    nq.cache_modulation(model)
    nq.cache_modulation(model)  # twice is once
    assert len(model._forward_pre_hooks) == 1
    nq.cache_modulation(model, False)
    assert not list(tables_of(model)) and not model._forward_pre_hooks and not model._forward_hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert same_bits(run(model, inputs), before) and not nq.explain(model).tables


def test_copies_begin_empty_and_are_their_own() -> None:
    pipe, arguments, found = quantized_pipeline()
    image = draw(pipe, arguments)
    twin = copy.deepcopy(pipe.transformer)
    own = tables(twin)
    assert own is not found and not own.order and found.order and len(own.members) == 6
    pipe.transformer = twin
    assert same_bits(draw(pipe, arguments), image)
    assert "no scheduler is known" in own.foresight.why_not and own.counts.misses == STEPS * 6
    plain = nq.dequantize(twin)
    assert not plain._forward_pre_hooks and not list(tables_of(plain))
    run(plain, MODELS["flux"]()[1])


def test_saving_knows_nothing_of_them(tmp_path: Any) -> None:
    model, inputs = quantized_model()
    before = state_of(model)
    nq.cache_modulation(model)
    y = run(model, inputs)
    assert not differences(state_of(model), before)
    nq.save(model, tmp_path / "model")
    assert same_bits(run(nq.load(tmp_path / "model"), inputs), y)


def test_explain_says_it_in_a_line() -> None:
    pipe, arguments, found = quantized_pipeline()
    draw(pipe, arguments)
    line, = nq.explain(pipe).tables
    assert line == ("modulation tables: 6 linears, 5 inputs, 0.04 MiB of outputs; 30 calls found theirs, 0 did not; "
                    "30 outputs computed ahead, of 1 schedules; 0.26 MiB of weights on cpu, where they stay")
    assert line in str(nq.explain(pipe))


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"enabled": "yes"}, "True or False"), ({"weights": "disk"}, "'host' or 'device'"), ({"limit": -1}, "bytes")])
def test_wrong_arguments(arguments: dict, sentence: str) -> None:
    model, _ = quantized_model()
    with pytest.raises(nq.NunchakuError, match=sentence):
        nq.cache_modulation(model, **arguments)


def test_a_model_without_any() -> None:
    model, _ = quantized_model("wan")
    with pytest.raises(nq.NunchakuError, match="no quantized modulation linears"):
        nq.cache_modulation(model)
    nq.cache_modulation(model, False)


# --------------------------------------------------------------------------------------------------- weights that are away
class Elsewhere:
    """Imitates a GPU without one: the weights of a site are garbled while they are away, and whoever reads them without
    fetching them computes something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away: set[int] = set()
        self.visits = 0
        monkeypatch.setattr(host, "is_away", lambda site, device: id(site) in self.away)
        monkeypatch.setattr(store, "is_away", lambda site, device: id(site) in self.away)
        monkeypatch.setattr(host, "fetch", self.fetch)

    def fetch(self, data: Tensor, device: torch.device) -> Tensor:
        self.visits += 1
        return garbled(data)

    def send(self, model: nn.Module) -> None:
        for site in modulation_linears(model).values():
            self.away.add(id(site))
            for tensor in host._tensors(site):
                tensor.data = garbled(tensor.data)


def garbled(data: Tensor) -> Tensor:
    return (~data.contiguous().view(torch.uint8)).view(data.dtype)


def test_weights_that_are_away_visit_only_for_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments, found = quantized_pipeline()
    with without_tables(pipe.transformer):
        before, other = draw(pipe, arguments), draw(pipe, arguments, guidance_scale=8.0)
    gpu = Elsewhere(monkeypatch)
    gpu.send(pipe.transformer)
    assert same_bits(draw(pipe, arguments), before)
    tensors = sum(len(host._tensors(site)) for site in modulation_linears(pipe.transformer).values())
    assert gpu.visits == tensors  # each once, for all steps
    assert same_bits(draw(pipe, arguments), before) and gpu.visits == tensors
    assert same_bits(draw(pipe, arguments, guidance_scale=8.0), other) and gpu.visits == 2 * tensors
    with without_tables(pipe.transformer):
        assert not same_bits(draw(pipe, arguments), before)  # they are garbled indeed


def test_compiling_refuses_what_is_away_and_takes_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized_model()
    linear = model.transformer_blocks[0].norm1.linear
    x = normal(1, 128)
    with torch.no_grad():
        before = linear(x)
        nq.cache_modulation(model)
        compiled = torch.compile(linear, backend="eager", fullgraph=True)
        assert same_bits(compiled(x), before)
        torch.compiler.reset()
        Elsewhere(monkeypatch).send(model)
        with pytest.raises(Exception, match="before compiling"):
            torch.compile(linear, backend="eager", fullgraph=True)(x)


def test_a_move_to_a_gpu_leaves_the_weights_on_the_host() -> None:
    model, inputs = quantized_model()
    nq.cache_modulation(model)
    run(model, inputs)
    site = model.transformer_blocks[0].norm1.linear
    codes = site.codes.data_ptr()
    site._apply(lambda tensor: SimpleNamespace(device=torch.device("cuda"), dtype=tensor.dtype))
    assert site.codes.data_ptr() == codes and site.table.home.type == "cuda" and not site.table.answers
    assert "on the host, of 1 linears that run on cuda" in nq.explain(model).tables[0]


@pytest.mark.gpu
@pytest.mark.parametrize("move", ["to", "model_cpu_offload", "sequential_cpu_offload"])
def test_weights_leave_a_gpu(move: str) -> None:
    pipe, arguments = flux(output_type="latent")
    nq.quantize(pipe.transformer, "rtn-int4")
    state = state_of(pipe.transformer)
    pipe.to("cuda")
    before = draw(pipe, arguments)
    pipe.to("cpu")
    nq.cache_modulation(pipe)
    pipe.to("cuda") if move == "to" else getattr(pipe, f"enable_{move}")()
    assert same_bits(draw(pipe, arguments), before)
    assert same_bits(draw(pipe, arguments), before)
    if move == "to":
        assert all(site.codes.device.type == "cpu" for site in modulation_linears(pipe.transformer).values())
        assert "6 linears that run on cuda" in nq.explain(pipe).tables[0]
        assert not differences({name: tensor.cpu() for name, tensor in state_of(pipe.transformer).items()}, state)
        nq.cache_modulation(pipe, False)
        assert all(site.codes.is_cuda for site in modulation_linears(pipe.transformer).values())
        assert same_bits(draw(pipe, arguments), before)
