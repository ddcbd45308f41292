"""A quantized model in use: offload, copies, casts, what diffusers does to models, inputs of any size, compilation."""
from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.linear import QuantizedSite
from nunchaku_py.swap import quantized_modules, quantized_sites
from tests.checks import QUICK, cast, differences, quantized_state, relative, run
from tests.fused import unfused
from tests.tiny import MODELS
from tests.tiny_pipelines import flux_call, flux_pipeline

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- offload
# Hooks on linears must see their calls: the model then runs module by module, with the bits of that.
def test_accelerate_cpu_offload(fresh) -> None:
    from accelerate import cpu_offload

    model, inputs, state = fresh
    expected = run(unfused(model), inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)


def test_offloaded_inside_a_pipeline(fresh) -> None:
    from accelerate import cpu_offload

    pipe = flux_pipeline(transformer=unfused(fresh[0]))
    expected = pipe(**flux_call()).images
    nq.set_fusion(pipe, True)
    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(pipe(**flux_call()).images, expected)


@pytest.mark.parametrize("how", [dict(offload_type="leaf_level"),
                                 dict(offload_type="block_level", num_blocks_per_group=1)], ids=["leaf", "block"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_group_offload(fresh, tmp_path, how: dict, to_disk: bool) -> None:
    model, inputs, _ = fresh
    expected = run(unfused(model) if how["offload_type"] == "leaf_level" else model, inputs)
    disk = dict(offload_to_disk_path=str(tmp_path)) if to_disk else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **how, **disk)
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)


def test_layerwise_casting_leaves_stored_tensors(fresh) -> None:
    model, inputs, _ = fresh
    stored = quantized_state(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    y = run(model, inputs)
    assert y.isfinite().all()
    assert differences(stored, quantized_state(model)) == []


# ------------------------------------------------------------------------------------------------- copies and casting
def test_copies(quantized) -> None:
    model, inputs, state = quantized
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = run(model, inputs)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert differences(state, twin.state_dict()) == []
        assert torch.equal(run(twin, inputs), expected)


def test_a_copy_shares_nothing(quantized) -> None:
    model, _, state = quantized
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert differences(state, model.state_dict()) == []


def test_state_dict_goes_into_another_quantized_model(quantized) -> None:
    model, inputs, state = quantized
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data.mul_(0.5)
    for site in quantized_sites(other):
        site.pack()
    assert not torch.equal(run(other, inputs), run(model, inputs))
    other.load_state_dict(state)
    assert torch.equal(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting(fresh, dtype: torch.dtype) -> None:
    """diffusers refuses model.to(dtype) for a quantized model, as for every backend; nn.Module's own cast works."""
    model, inputs, _ = fresh
    stored = quantized_state(model)
    with pytest.raises(ValueError, match="quantized"):
        model.to(dtype)
    assert differences(stored, quantized_state(model)) == []
    nn.Module.to(model, dtype)
    assert differences(stored, quantized_state(model)) == []
    assert model.dtype == dtype
    assert run(model, cast(inputs, dtype)).dtype == dtype


def test_to_device_and_train_and_eval(fresh) -> None:
    model, inputs, state = fresh
    expected = run(model, inputs)
    assert model.to("cpu") is model
    model.train()
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(run(model, inputs), expected)
    assert differences(state, model.state_dict()) == []


def test_meta_device() -> None:
    """A quantized model can be moved to the meta device, for the shape of its answer to be asked, and it says so."""
    model, inputs = MODELS["pixart"]()
    nq.quantize(model, "rtn-int4")
    nn.Module.to(model, "meta")
    assert all(p.is_meta for p in model.parameters())


def test_dtype_and_memory(quantized) -> None:
    model, _, state = quantized
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert model.is_quantized
    stored = sum(t.numel() * t.element_size() for t in state.values())
    derived = sum(b.numel() * b.element_size() for b in model.buffers())
    assert stored <= model.get_memory_footprint() <= stored + derived
    dense = MODELS["flux"]()[0].get_memory_footprint()
    assert stored < 0.55 * dense
    assert model.num_parameters() > 0


def test_dequantized_model_is_dense_and_what_a16_computes(fresh, tmp_path) -> None:
    model, inputs, state = fresh
    nq.set_mode(model, "a16")
    dense = nq.dequantize(model)
    assert not quantized_modules(dense) and not getattr(dense, "is_quantized", False)
    assert relative(run(dense, inputs), run(model, inputs)) < 0.02  # one rounding of the weights to bf16
    dense.save_pretrained(tmp_path)
    plain = type(dense).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert differences(dense.state_dict(), plain.state_dict()) == []
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dense.to(torch.float16)
    nq.quantize(dense, "rtn-int4")
    assert differences(state, model.state_dict()) == []


# ------------------------------------------------------------------------------------- what diffusers does to models
@pytest.mark.parametrize("quantized", ["int4"], indirect=True)
def test_processors_backends_caches_and_checkpointing(quantized) -> None:
    from diffusers import FirstBlockCacheConfig
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    model, inputs, _ = quantized
    expected = run(model, inputs)
    changes = {
        "processor": lambda m: m.set_attn_processor(FluxAttnProcessor()),
        "backend": lambda m: m.set_attention_backend("native"),
        "cache": lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=0.0)),
        "checkpointing": lambda m: (m.enable_gradient_checkpointing(), m.train()),
        "compile": lambda m: m.compile(backend="eager"),
    }
    for name, change in changes.items():
        twin = copy.deepcopy(model)
        change(twin)
        with twin.cache_context("a"):
            assert torch.equal(run(twin, inputs), expected), name


def test_fusing_projections_is_refused_and_dequantizing_allows_it_again(quantized) -> None:
    model, _, _ = quantized
    with pytest.raises(nq.NunchakuError, match="quantized projections stay separate modules"):
        copy.deepcopy(model).fuse_qkv_projections()
    dense = nq.dequantize(model)
    dense.fuse_qkv_projections()
    assert dense.transformer_blocks[0].attn.to_qkv.weight.isfinite().all()


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
def test_gradients(quantized, mode: str) -> None:
    """What guidance by a loss or training in front of a frozen model needs: dL/dx = dL/dy · W."""
    module = copy.deepcopy(quantized[0].transformer_blocks[0].attn.to_q)
    module.set_mode(mode)
    x = torch.randn(16, module.in_features).bfloat16().requires_grad_()
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert relative(x.grad, g.float() @ module.effective_weight()) < 0.02
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_quantizing_under_group_offload_and_after_compile() -> None:
    for change in (lambda m: m.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level",
                                                    offload_device=torch.device("cpu")),
                   lambda m: m.compile(backend="eager")):
        model, inputs = MODELS["flux"]()
        dense = run(model, inputs)
        change(model)
        run(model, inputs)
        nq.quantize(model, QUICK)
        assert 0.01 < relative(run(model, inputs), dense) < 0.3


# ----------------------------------------------------------------------------------------------------- looks and inputs
def test_quantized_linears_look_like_linears(quantized) -> None:
    model, _, _ = quantized
    plain = MODELS["flux"]()[0]
    for name, module in quantized_modules(model).items():
        old = plain.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (old.in_features, old.out_features)
        assert module.weight.shape == old.weight.shape and module.weight.dtype == torch.bfloat16
        assert module.weight.device == old.weight.device and (old.bias is None or module.bias is not None)
        assert f"{name}.weight" not in model.state_dict()
    assert str(model)


def test_peft_can_look_at_the_weights(quantized) -> None:
    """LoRA itself comes later; what PEFT asks of a layer before it starts must not crash."""
    from peft.tuners.tuners_utils import _get_in_out_features

    for name, module in quantized[0].named_modules():
        if isinstance(module, QuantizedSite):
            assert _get_in_out_features(module) == (module.in_features, module.out_features), name


def test_modes(fresh) -> None:
    model, inputs, state = fresh
    answers = {}
    for mode in ("a4", "a8", "a16", "a8", "a4"):
        nq.set_mode(model, mode)
        y = run(model, inputs)
        assert torch.equal(answers.setdefault(mode, y), y), "a mode that is left and entered again gives the same"
        assert differences(state, model.state_dict()) == []
    assert relative(answers["a8"], answers["a16"]) < relative(answers["a4"], answers["a16"])


@pytest.mark.parametrize("side", [1, 2, 7, 22])
def test_token_counts(quantized, side: int) -> None:
    """1 to 484 image tokens."""
    model, inputs, _ = quantized
    from tests.tiny_models import normal

    tokens = side * side
    sized = {**inputs, "hidden_states": normal(1, tokens, 64), "img_ids": torch.zeros(tokens, 3)}
    y = run(model, sized)
    assert y.shape == (1, tokens, 64) and y.isfinite().all()


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
def test_rows_do_not_see_each_other(quantized, mode: str) -> None:
    """Any number of rows, contiguous or not, one by one or together: the same numbers but for the order of sums."""
    module = copy.deepcopy(quantized[0].transformer_blocks[0].ff.net[0].proj)
    module.set_mode(mode)
    x = torch.randn(4608, module.in_features).bfloat16()
    y = module(x)
    assert torch.equal(module(x.T.contiguous().T), y)
    assert torch.equal(module(x.reshape(2, 48, 48, -1)).reshape(4608, -1), y)
    wide = torch.randn(4608, 2 * module.in_features).bfloat16()
    wide[:, ::2] = x
    assert torch.equal(module(wide[:, ::2]), y)
    for rows in (1, 3, 7, 513):
        assert relative(module(x[:rows]), y[:rows]) < 2**-8, rows  # bf16 rounds once
    assert module(x[:0]).shape == (0, module.out_features)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches(batch: int) -> None:
    from tests.tiny_models import flux

    model, inputs = flux(batch)
    dense = run(model, inputs)
    nq.quantize(model, QUICK)
    y = run(model, inputs)
    assert y.shape == dense.shape and relative(y, dense) < 0.3
    alone = {k: v[:1] if isinstance(v, torch.Tensor) and "ids" not in k else v for k, v in inputs.items()}
    assert relative(run(model, alone), y[:1]) < 0.02


# ------------------------------------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("mode", ["a4", "a16"])
def test_compiled_blocks(mode: str) -> None:
    model, inputs = MODELS["flux"]()
    nq.quantize(model, QUICK, mode=mode)
    expected = run(model, inputs)
    torch._dynamo.reset()
    model.single_transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    model.transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    assert relative(run(model, inputs), expected) < 0.02


@pytest.mark.parametrize("quantized", ["int4"], indirect=True)
def test_compile_repeated_blocks(fresh) -> None:
    """In a8, which is what a CPU runs by itself."""
    model, inputs, _ = fresh
    expected = run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative(run(model, inputs), expected) < 0.02
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("quantized", ["int4"], indirect=True)
def test_inductor(quantized) -> None:
    module = copy.deepcopy(quantized[0].transformer_blocks[0].attn.to_q)
    x = torch.randn(16, module.in_features).bfloat16()
    expected = module(x)
    torch._dynamo.reset()
    assert relative(torch.compile(module, fullgraph=True)(x), expected) < 2**-8
