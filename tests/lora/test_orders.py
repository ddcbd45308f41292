"""Calls in odd orders, and from other entrances: what is on is what PEFT says is on, or a sentence."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from tests.checks import relative, run
from tests.lora.test_loading import pipeline
from tests.lora.toys import dense, quantized, toy
from tests.tiny import MODELS

QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


@pytest.fixture(scope="module")
def base() -> tuple[nn.Module, dict]:
    model, inputs = MODELS["flux"]()
    nq.quantize(model, "rtn-int4", mode="a16")
    return model, inputs


@pytest.fixture
def model(base: tuple) -> nn.Module:
    return copy.deepcopy(base[0])


@pytest.fixture
def inputs(base: tuple) -> dict:
    return base[1]


def load(model: nn.Module, name: str, names: list[str] | None = None, **more: Any) -> None:
    model.load_lora_adapter(toy(model, names or quantized(model), **more), prefix=None, adapter_name=name)


# ----------------------------------------------------------------------------------------------------------- gradients
def gradients(model: nn.Module, inputs: dict, between: Any = lambda: None) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs)[0].float().square().mean()
    between()
    loss.backward()
    return [p.grad.clone() for name, p in model.named_parameters() if "lora_" in name]


def test_what_is_folded_between_forward_and_backward_does_not_count(model: nn.Module, inputs: dict) -> None:
    load(model, "style")
    expected = gradients(model, inputs)

    def reference() -> None:
        run(model, inputs)
        model.disable_lora()
        run(model, inputs)
        model.enable_lora()

    for found, wanted in zip(gradients(model, inputs, reference), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_frozen_adapter_is_in_the_gradient_at_the_strength_of_the_call(model: nn.Module) -> None:
    load(model, "style", [QUERY])
    layer = model.get_submodule(QUERY)
    layer.requires_grad_(False)
    x = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for after in (1.0, 0.0):
        layer.set_scale("style", 1.0)
        y = layer(x).float().square().sum()
        layer.set_scale("style", after)
        found.append(torch.autograd.grad(y, x)[0])
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------------------- compile
def test_a_call_for_gradients_before_compiling(model: nn.Module, inputs: dict) -> None:
    load(model, "style", [QUERY, KEY])
    expected = run(model, inputs)
    model(**inputs)
    torch._dynamo.reset()
    assert relative(run(torch.compile(model, backend="eager"), inputs), expected) < 0.02
    assert torch.equal(run(model, inputs), expected)


def test_training_in_a_graph_is_refused(model: nn.Module) -> None:
    load(model, "style", [QUERY])
    torch._dynamo.reset()
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="not trained in compiled graphs"):
        torch.compile(model.get_submodule(QUERY), fullgraph=True, backend="eager")(x)


# ----------------------------------------------------------------------------------------------------- fuse and unload
def only(base: nn.Module, inputs: dict, *adapters: tuple) -> torch.Tensor:
    model = copy.deepcopy(base)
    for name, names, seed in adapters:
        load(model, name, names, seed=seed)
    model.set_adapters([name for name, _, _ in adapters])
    return run(model, inputs)


def test_fusing_adapters_on_other_modules(base: tuple, model: nn.Module, inputs: dict) -> None:
    load(model, "a", [QUERY, KEY])
    load(model, "b", [KEY], seed=1)
    model.set_adapters(["a", "b"])
    both, a = run(model, inputs), only(base[0], inputs, ("a", [QUERY, KEY], 0))
    model.fuse_lora()
    assert torch.equal(run(model, inputs), both)
    model.unfuse_lora()
    assert torch.equal(run(model, inputs), both)
    model.fuse_lora(adapter_names=["a"])
    assert relative(run(model, inputs), a) < 0.01
    model.unload_lora()
    assert relative(run(model, inputs), a) < 0.01 < relative(both, a)
    assert {model.get_submodule(name).site.rank for name in (QUERY, KEY)} == {8}, "4 of each, and no padding"


def test_peft_merges_and_unloads_some(base: tuple, model: nn.Module, inputs: dict, tmp_path: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    wrapped.base_model.set_adapter("a")
    a = run(model, inputs)
    wrapped.base_model.set_adapter(["a", "b"])
    assert relative(run(model, inputs), a) > 0.01
    merged = wrapped.merge_and_unload(adapter_names=["a"])
    assert relative(run(merged, inputs), a) < 0.01
    nq.save(merged, tmp_path / "merged")
    assert torch.equal(run(nq.load(tmp_path / "merged", mode="a16"), inputs), run(merged, inputs))


def test_what_stays_takes_no_room_with_it(model: nn.Module, inputs: dict) -> None:
    nq.reserve_lora(model, 32)
    load(model, "a", [QUERY])
    after = run(model, inputs)
    model.fuse_lora()
    model.unload_lora()
    assert model.get_submodule(QUERY).site.rank == 4 and torch.equal(run(model, inputs), after)
    load(model, "b", [KEY], seed=1)
    assert not torch.equal(run(model, inputs), after)


def test_a_refused_fuse_fuses_nothing(model: nn.Module, inputs: dict) -> None:
    load(model, "plain", [QUERY, KEY])
    state = toy(model, [KEY], seed=1) | {f"{KEY}.lora_magnitude_vector": torch.ones(128)}
    model.load_lora_adapter(state, prefix=None, adapter_name="dora")
    model.set_adapters(["plain", "dora"])
    before = run(model, inputs)
    with pytest.raises(NunchakuError, match="'dora' is more than a low-rank term"):
        model.fuse_lora()
    assert torch.equal(run(model, inputs), before)
    assert not any(layer.merged_adapters for layer in model.modules() if hasattr(layer, "merged_adapters"))


def test_dequantize_with_adapters_that_are_off(model: nn.Module, inputs: dict) -> None:
    load(model, "style", [QUERY])
    model.disable_lora()
    with pytest.raises(NunchakuError, match="carries an adapter"):
        nq.dequantize(model)


def test_fused_adapters_do_not_stay_in_what_is_offloaded(model: nn.Module, inputs: dict) -> None:
    from accelerate import cpu_offload

    load(model, "style", [QUERY])
    model.fuse_lora()
    cpu_offload(model, execution_device=torch.device("cpu"))
    before = run(model, inputs)
    with pytest.raises(NunchakuError, match="remove the offloading before, or unfuse"):
        model.unload_lora()
    assert torch.equal(run(model, inputs), before)


# ------------------------------------------------------------------------------------------------------ loading, again
@pytest.mark.parametrize("active", [["a", "b"], ["b"], []])
def test_a_load_that_fails_leaves_others_as_they_were(model: nn.Module, inputs: dict, active: list[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    pipe = pipeline("flux", model)[0]
    load(model, "a")
    load(model, "b", seed=1)
    model.set_adapters(active or ["b"], [0.7, 0.4][:len(active or ["b"])])
    if not active:
        model.disable_lora()
    before = run(model, inputs)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="in the middle"):
        patched.setattr(peft, "set_peft_model_state_dict", broken)
        pipe.load_lora_weights(toy(model, [QUERY], seed=2, prefix="transformer."), adapter_name="c")
    assert torch.equal(run(model, inputs), before)
    model.enable_lora()
    assert model.active_adapters() == (active or ["b"])


def test_no_memory_for_an_adapter_is_not_forgotten(model: nn.Module, inputs: dict, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    from nunchaku_py.lora import branch

    load(model, "a")
    load(model, "b", seed=1)
    model.set_adapters(["a", "b"])
    both = run(model, inputs)
    model.set_adapters("a")
    original, calls = branch._up, []

    def short(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 20:
            raise MemoryError
        return original(*args)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(branch, "_up", short)
        model.set_adapters(["a", "b"])
    assert torch.equal(run(model, inputs), both)


def test_names_and_strengths_that_others_give(model: nn.Module) -> None:
    state = toy(model, [QUERY])
    model.load_lora_adapter(pretrained_model_name_or_path_or_dict=state, prefix=None, adapter_name="named")
    model.load_lora_adapter(dict(state), prefix=None, adapter_name="meta",
                            metadata={"r": 4, "lora_alpha": 8, "target_modules": [QUERY]})
    prefixed = {f"transformer.{key}": tensor for key, tensor in state.items()}
    model.load_lora_adapter(prefixed, network_alphas={f"transformer.{QUERY}.alpha": 1.0}, adapter_name="alphas")
    scaling = model.get_submodule(QUERY).scaling
    assert scaling == {"named": 1.0, "meta": 2.0, "alphas": 0.25}


def test_loads_without_a_name() -> None:
    from tests.tiny import PIPELINES

    pipe, _ = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, "rtn-int4")
    words = [name for name, module in pipe.text_encoder.named_modules() if isinstance(module, nn.Linear)]
    first = pipe.load_lora_weights(toy(pipe.transformer, [QUERY], prefix="transformer."))
    second = pipe.load_lora_weights(toy(pipe.transformer, [QUERY], prefix="transformer.")
                                    | toy(pipe.text_encoder, words, prefix="text_encoder."))
    assert (first.adapter, second.adapter) == ("default_0", "default_1")
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1"], "text_encoder": ["default_1"]}


def test_wan_has_two_transformers() -> None:
    models = [MODELS["wan"]()[0] for _ in range(2)]
    for model in models:
        nq.quantize(model, "rtn-int4")
    pipe, _ = pipeline("wan", models[0])
    pipe.register_modules(transformer_2=models[1])
    state = toy(models[0], quantized(models[0]), prefix="transformer.")
    pipe.load_lora_weights(state, adapter_name="high")
    pipe.load_lora_weights(state, adapter_name="low", load_into_transformer_2=True)
    assert pipe.get_list_adapters() == {"transformer": ["high"], "transformer_2": ["low"]}


def test_unquantized_pipelines_take_their_arguments_by_name() -> None:
    model, inputs = MODELS["flux"]()
    pipe, _ = pipeline("flux", model)
    state = toy(model, dense(model)[:1], prefix="transformer.")
    pipe.load_lora_weights(pretrained_model_name_or_path_or_dict=state, adapter_name="style")
    assert pipe.get_list_adapters() == {"transformer": ["style"]}


@pytest.mark.parametrize("way", ["pissa", "olora", "corda"])
def test_initializations_that_would_change_the_weight(model: nn.Module, way: str) -> None:
    from peft import LoraConfig

    with pytest.raises(NunchakuError, match="changes the weight of the layer, which is quantized"):
        model.add_adapter(LoraConfig(r=4, target_modules=[QUERY], init_lora_weights=way))


def test_writes_that_leave_no_trace(model: nn.Module, inputs: dict) -> None:
    load(model, "style", [QUERY])
    model.set_adapters("style", 0.0)
    before = run(model, inputs)
    model.set_adapters("style", 1.0)
    model.get_submodule(QUERY).lora_B["style"].weight.data.zero_()
    nq.refresh_lora(model)
    assert torch.equal(run(model, inputs), before)
