"""Modulation tables: weights that are away visit only for what is new; on, off, copies, saving, offloading."""
from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import Tensor, nn

import nunchaku_py as nq
from nunchaku_py.tables import host, modulation_linears, pages, store
from nunchaku_py.tables.foresee import tables_of
from tests.checks import differences, run, same_bits, state_of
from tests.tabled import STEPS, draw, flux, quantized_model, quantized_pipeline, tables, without_tables
from tests.tiny import MODELS
from tests.tiny_models import normal


# -------------------------------------------------------------------------------------------------- on, off, and copies
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
                    "30 outputs computed ahead, of 1 schedules; 0.26 MiB of weights on cpu, they stay there")
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


# ------------------------------------------------------------------------------------------------ weights that are away
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


@pytest.mark.parametrize("change", [
    lambda model: model.compile(backend="eager", fullgraph=True),
    lambda model: model.compile_repeated_blocks(backend="eager", fullgraph=True)])
def test_compiled_models_run_as_without(change: Callable[[nn.Module], None]) -> None:
    pipe, arguments, found = quantized_pipeline()
    with without_tables(pipe.transformer):
        before = draw(pipe, arguments)
    change(pipe.transformer)
    assert same_bits(draw(pipe, arguments), before) and not found.order
    torch.compiler.reset()


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


# ------------------------------------------------------------------------------------------------ offloading and caches
def _group_offload(model: nn.Module) -> None:
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
                               offload_type="leaf_level")


def _model_offload(model: nn.Module) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))


def _cache(model: nn.Module) -> None:
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


@pytest.mark.parametrize("tables_first", [True, False])
@pytest.mark.parametrize(("change", "hits", "schedules"), [
    (_group_offload, 30, 0), (_model_offload, 60, 1), (_cache, 30, 0)])
def test_offloading_and_caches(change: Callable[[nn.Module], None], hits: int, schedules: int,
                               tables_first: bool) -> None:
    """hits in two images. Hooks on single modules must see no calls that are no steps: nothing is computed ahead."""
    plain, arguments, pipe = flux()[0], *reversed(flux())
    for one in (plain, pipe):
        nq.quantize(one.transformer, "rtn-int4")
    change(plain.transformer)
    before = draw(plain, arguments)
    for action in ((lambda: nq.cache_modulation(pipe), lambda: change(pipe.transformer))[::1 if tables_first else -1]):
        action()
    for _ in range(2):
        assert same_bits(draw(pipe, arguments), before)
    found = tables(pipe.transformer)
    assert (found.counts.hits, found.counts.schedules) == (hits, schedules)


@pytest.mark.parametrize("tables_first", [True, False])
def test_hooks_that_bring_weights_for_every_call_leave_nothing_to_save(tables_first: bool) -> None:
    model, inputs = quantized_model()
    nq.set_fusion(model, False)  # it steps aside for hooks, which changes bits
    before = run(model, inputs)
    for on in (tables_first, not tables_first):
        nq.cache_modulation(model) if on else accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert same_bits(run(model, inputs), before)
    assert (tables(model).counts.hits, tables(model).counts.misses) == (0, 0)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert same_bits(run(model, inputs), before) and tables(model).counts.misses == 6
    nq.cache_modulation(model, False)
    assert same_bits(run(model, inputs), before)


def test_pages_of_a_file_are_given_back(tmp_path: Any) -> None:
    pipe, arguments, _ = quantized_pipeline()
    before = draw(pipe, arguments)
    nq.save(pipe.transformer, tmp_path / "model")
    pipe.transformer = nq.load(tmp_path / "model")
    if not any(pages.give_back(site.parameters(), pages.mapped_files())
               for site in modulation_linears(pipe.transformer).values()):
        pytest.skip("this system maps no files, or takes no pages back")
    for weights, expected in (("device", 0), ("host", 1)):
        nq.cache_modulation(pipe, weights=weights)
        assert same_bits(draw(pipe, arguments), before)
        assert (tables(pipe.transformer).given_back > 0) == expected
    assert "of them in pages given back to their file" in nq.explain(pipe).tables[0]


def test_memory_of_its_own_is_not_given_back() -> None:
    own = torch.ones(10**6)
    assert not pages.give_back([own], pages.mapped_files()) and own.sum() == 10**6
