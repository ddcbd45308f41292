"""Models with adapters under what people do to models: copies, offloading, compiling, training, saving, hot swaps."""
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.models.flux_blocks import DOUBLE_BLOCKS
from tests.checks import relative, run
from tests.lora.toys import dense, quantized, toy
from tests.tiny import MODELS


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, dict]:
    """A quantized FLUX with an adapter on all that is quantized, and inputs."""
    model, inputs = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    model.load_lora_adapter(toy(model, quantized(model)), prefix=None, adapter_name="style")
    return model, inputs


@pytest.fixture
def model(made: tuple) -> nn.Module:
    return copy.deepcopy(made[0])


@pytest.fixture
def inputs(made: tuple) -> dict:
    return made[1]


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    model.disable_lora()
    try:
        yield
    finally:
        model.enable_lora()


# --------------------------------------------------------------------------------------------------------------- copies
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_their_own(model: nn.Module, inputs: dict, copied: Callable) -> None:
    before, other = run(model, inputs), copied(model)
    assert torch.equal(run(other, inputs), before)
    other.set_adapters("style", 0.3)
    assert not torch.equal(run(other, inputs), before) and torch.equal(run(model, inputs), before)
    other.unload_lora()
    with without(model):
        assert torch.equal(run(other, inputs), run(model, inputs))
    assert torch.equal(run(model, inputs), before)


def test_a_model_is_freed(made: tuple) -> None:
    import gc
    import weakref

    model = copy.deepcopy(made[0])
    gone = weakref.ref(model.transformer_blocks[0].attn.to_q.base_layer)
    del model
    gc.collect()
    assert gone() is None


def test_a_layer_somebody_holds_on_to_does_not_keep_its_adapter(model: nn.Module, inputs: dict) -> None:
    with without(model):
        before = run(model, inputs)
    held = model.transformer_blocks[0].attn.to_q
    model.unload_lora()
    assert torch.equal(run(model, inputs), before) and held.base_layer is model.transformer_blocks[0].attn.to_q
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        assert not torch.equal(held(x), held.base_layer(x))  # its adapter beside the linear, which stays as it is
    assert torch.equal(run(model, inputs), before)


def test_what_was_folded_in_inference_mode_can_be_changed_outside(model: nn.Module, inputs: dict) -> None:
    with torch.inference_mode():
        model.disable_lora()
        model.enable_lora()
    whole = run(model, inputs)
    model.set_adapters("style", 0.5)
    assert not torch.equal(run(model, inputs), whole)
    model.set_adapters("style", 1.0)
    assert torch.equal(run(model, inputs), whole)


def test_a_fused_adapter_is_not_deleted(model: nn.Module, inputs: dict) -> None:
    before = run(model, inputs)
    model.fuse_lora()
    with pytest.raises(NunchakuError, match="is fused: unfuse before deleting it"):
        model.delete_adapters("style")
    assert torch.equal(run(model, inputs), before)
    model.unfuse_lora()
    model.delete_adapters("style")
    assert not torch.equal(run(model, inputs), before)


def test_peft_takes_its_layers_off(made: tuple) -> None:
    from peft import LoraConfig, get_peft_model

    model, inputs = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    before = run(model, inputs)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_out"],
                                               init_lora_weights=False))
    adapted = run(wrapped.base_model.model, inputs)
    assert relative(adapted, before) > 0.01
    assert torch.equal(run(wrapped.unload(), inputs), before)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    adapted = run(wrapped.base_model.model, inputs)
    merged = wrapped.merge_and_unload()
    assert relative(run(merged, inputs), adapted) < 0.02 and not any("lora" in name for name in merged.state_dict())


# ---------------------------------------------------------------------------------------------------------- what is run
def test_patterns_run_with_adapters(model: nn.Module) -> None:
    explanation = nq.explain(model)
    for pattern in explanation.patterns:
        assert not pattern.refusals, pattern
    assert explanation.adapters == [f"adapters style: in the branch of {len(quantized(model))} linears"]


def test_modes(model: nn.Module, inputs: dict) -> None:
    for mode in ("a4", "a16", "a8"):
        nq.set_mode(model, mode)
        with_it = run(model, inputs)
        with without(model):
            assert relative(with_it, run(model, inputs)) > 0.01
    nq.set_fusion(model, False)
    assert relative(run(model, inputs), with_it) < 0.03


def test_a_hook_of_the_users_sees_the_layer(model: nn.Module, inputs: dict) -> None:
    calls = []
    model.transformer_blocks[0].attn.to_k.register_forward_hook(lambda *_: calls.append(1))
    expected = run(model, inputs)
    with torch.no_grad():
        assert calls and DOUBLE_BLOCKS.refuses(model.transformer_blocks[0]) is not None
        assert DOUBLE_BLOCKS.refuses(model.transformer_blocks[1]) is None
    assert expected.isfinite().all()


def test_only_layers_in_16_bit(inputs: dict) -> None:
    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    before, names = run(model, inputs), [name for name in dense(model) if "embedder" in name]
    model.load_lora_adapter(toy(model, names), prefix=None, adapter_name="style")
    assert relative(run(model, inputs), before) > 0.01
    model.unload_lora()
    assert torch.equal(run(model, inputs), before)


def test_a_strength_for_each_block(inputs: dict) -> None:
    """As diffusers has it for UNets: a dictionary of blocks."""
    model, inputs = MODELS["sdxl"]()
    nq.quantize(model, "rtn-int4")
    before = run(model, inputs)
    model.load_lora_adapter(toy(model, quantized(model)), prefix=None, adapter_name="style")
    all_of_it = run(model, inputs)
    model.set_adapters("style", {"down": 0.0, "mid": 0.0, "up": 1.0})
    some = run(model, inputs)
    assert not torch.equal(some, all_of_it) and not torch.equal(some, before)
    model.set_adapters("style", {"down": 0.0, "mid": 0.0, "up": 0.0})
    assert torch.equal(run(model, inputs), before)


def test_the_scale_of_a_call(model: nn.Module, inputs: dict) -> None:
    """joint_attention_kwargs={"scale": …}, which diffusers multiplies strengths with for one call."""
    whole = run(model, inputs)
    half = run(model, {**inputs, "joint_attention_kwargs": {"scale": 0.5}})
    assert torch.equal(run(model, inputs), whole)
    model.set_adapters("style", 0.5)
    assert torch.equal(half, run(model, inputs))


def test_several_adapters_in_one_batch(model: nn.Module) -> None:
    """PEFT's adapter_names: one for each row."""
    layer = model.transformer_blocks[0].attn.to_q
    x = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        adapted = layer(x)
        mixed = layer(x, adapter_names=["style", "__base__"])
        layer.enable_adapters(False)
        plain = layer(x)
    assert relative(mixed[:1], adapted[:1]) < 0.02 and torch.equal(mixed[1:], plain[1:])


# -------------------------------------------------------------------------------------------------------------- offload
def sequential(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def in_groups(model: nn.Module, kind: str) -> None:
    from diffusers.hooks import apply_group_offloading

    device = torch.device("cpu")
    apply_group_offloading(model, onload_device=device, offload_device=device, offload_type=kind,
                           num_blocks_per_group=1)


OFFLOADS = {"sequential": sequential, "leaves": lambda model: in_groups(model, "leaf_level"),
            "blocks": lambda model: in_groups(model, "block_level")}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_strengths_are_hot_under_offloading(model: nn.Module, inputs: dict, offload: Callable) -> None:
    nq.set_fusion(model, False)  # offloading hooks onto the linears, which patterns step aside for
    expected = {}
    for scale in (1.0, 0.3):
        model.set_adapters("style", scale)
        expected[scale] = run(model, inputs)
    with without(model):
        expected[None] = run(model, inputs)
    model.set_adapters("style", 1.0)
    offload(model)
    assert torch.equal(run(model, inputs), expected[1.0])
    model.set_adapters("style", 0.3)
    assert torch.equal(run(model, inputs), expected[0.3])
    with without(model):
        assert torch.equal(run(model, inputs), expected[None])
    assert torch.equal(run(model, inputs), expected[0.3])


# -------------------------------------------------------------------------------------------------------------- compile
def compiled(model: nn.Module) -> tuple[nn.Module, list]:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def test_strengths_are_hot_when_compiled(model: nn.Module, inputs: dict) -> None:
    fast, graphs = compiled(model)
    for scale in (1.0, 0.4, 0.0, -1.0):
        model.set_adapters("style", scale)
        assert torch.equal(run(fast, inputs), run(model, inputs))
    assert len(graphs) == 1


def test_adapters_come_and_go_in_reserved_room(model: nn.Module, inputs: dict) -> None:
    with without(model):
        before = run(model, inputs)
    nq.reserve_lora(model, 16)
    fast, graphs = compiled(model)
    assert torch.equal(run(fast, inputs), run(model, inputs))
    model.load_lora_adapter(toy(model, quantized(model), rank=8, seed=1), prefix=None, adapter_name="other")
    for names, weights in ((["style", "other"], [1.0, 0.5]), (["other"], [0.7]), (["style"], [0.2])):
        model.set_adapters(names, weights)
        assert torch.equal(run(fast, inputs), run(model, inputs))
    with without(model):
        assert torch.equal(run(fast, inputs), before)
    model.delete_adapters("style")
    assert torch.equal(run(fast, inputs), run(model, inputs))
    assert len(graphs) == 1
    nq.reserve_lora(model, 0)
    model.unload_lora()
    assert torch.equal(run(model, inputs), before)


def test_more_than_was_reserved(model: nn.Module, inputs: dict) -> None:
    exact = run(model, inputs)
    nq.reserve_lora(model, 3)
    site = model.transformer_blocks[0].attn.to_q.base_layer
    assert site.adapter_up.shape[1] == site.site.rank + 6
    assert relative(run(model, inputs), exact) < 0.01
    for wrong in (-1, 1.5, None):
        with pytest.raises(NunchakuError, match="reserve_lora: rank is a whole number"):
            nq.reserve_lora(model, wrong)


def test_hot_swap(inputs: dict) -> None:
    """PEFT's: other weights and another rank under the name of an adapter, as PEFT prepares for it."""
    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    names = quantized(model)
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(toy(model, names, rank=4), prefix=None, adapter_name="style")
    fast, graphs = compiled(model)
    first = run(fast, inputs)
    model.load_lora_adapter(toy(model, names, rank=8, seed=5), prefix=None, adapter_name="style", hotswap=True)
    swapped = run(fast, inputs)
    assert len(graphs) == 1 and relative(swapped, first) > 0.01
    fresh = copy.deepcopy(model)
    fresh.unload_lora()
    fresh.load_lora_adapter(toy(model, names, rank=8, seed=5), prefix=None, adapter_name="style")
    assert relative(swapped, run(fresh, inputs)) < 0.01


# ------------------------------------------------------------------------------------------------------------- training
def test_adapters_train_on_quantized_linears(model: nn.Module, inputs: dict) -> None:
    before = run(model, inputs)
    found = model(**inputs)[0]
    assert relative(found, before) < 0.03
    found.float().square().mean().backward()
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters.values())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    torch.optim.SGD(parameters.values(), lr=0.05).step()
    after = run(model, inputs)  # what an optimizer changed is folded anew
    assert relative(after, before) > 1e-3 and relative(model(**inputs)[0], after) < 0.03


def test_gradients_are_those_of_the_16_bit_linear() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from tests.test_linear import K, linear, site

    holder = nn.Module()
    holder.one = linear(site(), "a16", torch.float32)
    plain = nn.Module()
    plain.one = holder.one.dense().float()
    config = LoraConfig(r=4, target_modules=["one"], init_lora_weights=False)
    for module in (holder, plain):
        torch.manual_seed(0)
        inject_adapter_in_model(config, module)
    results = []
    for module in (holder, plain):
        x = torch.randn(7, K, generator=torch.Generator().manual_seed(1), requires_grad=True)
        module.one(x).square().mean().backward()
        results.append((x.grad, module.one.lora_A["default"].weight.grad, module.one.lora_B["default"].weight.grad))
    for mine, exact in zip(*results, strict=True):
        assert relative(mine, exact) < 1e-3


# ----------------------------------------------------------------------------------------------------- saving and DoRA
def test_saving(model: nn.Module, inputs: dict, tmp_path: Any) -> None:
    with pytest.raises(NunchakuError, match="carries an adapter"):
        nq.save(model, tmp_path / "no")
    with pytest.raises(NunchakuError, match="adapter"):
        nq.dequantize(model)
    adapted = run(model, inputs)
    model.fuse_lora()
    model.unload_lora()
    assert torch.equal(run(model, inputs), adapted)
    nq.save(model, tmp_path / "fused")
    assert torch.equal(run(nq.load(tmp_path / "fused"), inputs), adapted)
    model.load_lora_adapter(toy(model, quantized(model), seed=3), prefix=None, adapter_name="more")
    assert relative(run(model, inputs), adapted) > 0.01
    model.unload_lora()
    assert torch.equal(run(model, inputs), adapted)


def test_unfusing_is_exact_in_16_bit_layers_too(inputs: dict) -> None:
    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_lora_adapter(toy(model, [*quantized(model), *dense(model)]), prefix=None, adapter_name="style")
    adapted = run(model, inputs)
    model.fuse_lora()
    assert relative(run(model, inputs), adapted) < 0.02
    model.unfuse_lora()
    assert torch.equal(run(model, inputs), adapted)
    model.unload_lora()
    assert all(torch.equal(tensor.view(torch.uint8) if tensor.ndim else tensor, before[name].view(torch.uint8)
                           if tensor.ndim else before[name]) for name, tensor in model.state_dict().items())


def test_saving_the_adapter(model: nn.Module, inputs: dict, tmp_path: Any) -> None:
    """What was loaded is what diffusers saves."""
    before = run(model, inputs)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.unload_lora()
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="again")
    assert torch.equal(run(model, inputs), before)


def test_dora(inputs: dict) -> None:
    """The norm is that of the weight that the linear stands for: as on its dequantized copy."""
    model, _ = MODELS["flux"]()
    nq.quantize(model, "rtn-int4", mode="a16")
    names = [name for name in quantized(model) if "attn" in name or "proj_out" in name]
    state = toy(model, names)
    for i, name in enumerate(names):
        rows = model.get_submodule(name).out_features
        state[f"{name}.lora_magnitude_vector"] = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(i))
    wide = nq.dequantize(model)
    before = run(model, inputs)
    for one in (model, wide):
        one.load_lora_adapter(dict(state), prefix=None, adapter_name="dora")
    assert relative(run(model, inputs), run(wide, inputs)) < 0.03 < relative(run(model, inputs), before)
    assert "adapters dora: beside" in str(nq.explain(model)) and "is a DoRA" in str(nq.explain(model))
    model.load_lora_adapter(toy(model, names, seed=1), prefix=None, adapter_name="plain")
    model.set_adapters(["dora", "plain"], [1.0, 0.5])
    assert relative(run(model, inputs), run(wide, inputs)) > 0.01
    with pytest.raises(NunchakuError, match="DoRA"):
        model.fuse_lora()
    model.unload_lora()
    assert torch.equal(run(model, inputs), before)


# -------------------------------------------------------------------------------------------------------- text encoders
@pytest.mark.parametrize("quantize_it", [True, False])
def test_text_encoders(quantize_it: bool) -> None:
    from tests.tiny import PIPELINES

    pipe, _ = PIPELINES["flux_prompt"]()
    nq.quantize(pipe, "rtn-int4", components=["transformer", "text_encoder"] if quantize_it else ["transformer"])

    def image() -> torch.Tensor:
        return pipe(**PIPELINES["flux_prompt"]()[1]).images

    before = image()
    linears = [name for name, module in pipe.text_encoder.named_modules() if isinstance(module, nn.Linear)]
    report = pipe.load_lora_weights(toy(pipe.text_encoder, linears, prefix="text_encoder."), adapter_name="words")
    assert report.modules == {"text_encoder": len(linears)}
    after = image()
    assert relative(after, before) > 0.01 and pipe.get_list_adapters() == {"text_encoder": ["words"]}
    pipe.set_adapters("words", 0.0)
    assert torch.equal(image(), before)
    pipe.set_adapters("words", 1.0)
    assert torch.equal(image(), after)
    pipe.disable_lora()
    assert torch.equal(image(), before)
    pipe.enable_lora()
    assert torch.equal(image(), after)
    pipe.unload_lora_weights()
    assert torch.equal(image(), before)
