"""`load_lora_weights` on pipelines: every family's own loader, whole or not at all, with a report."""
from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from tests.checks import relative, run
from tests.lora.toys import State, dense, normal, quantized, toy
from tests.lora.writers import (
    FLUX_FUSED,
    KOHYA,
    PEFT,
    blocks,
    flattened,
    lora_of,
    prefixed,
    target_of,
    write,
    write_fused,
)
from tests.tiny import MODELS

PIPELINES = {  # model → pipeline class, and what it calls the model
    "flux": ("FluxPipeline", "transformer"), "flux2": ("Flux2Pipeline", "transformer"),
    "sdxl": ("StableDiffusionXLPipeline", "unet"), "sd3": ("StableDiffusion3Pipeline", "transformer"),
    "qwen_image": ("QwenImagePipeline", "transformer"), "z_image": ("ZImagePipeline", "transformer"),
    "sana": ("SanaPipeline", "transformer"), "pixart": ("PixArtSigmaPipeline", "transformer"),
    "wan": ("WanPipeline", "transformer"), "chroma": ("ChromaPipeline", "transformer"),
}


def pipeline(name: str, model: nn.Module) -> tuple[Any, str]:
    """A pipeline that holds nothing but its denoiser and a scheduler."""
    import diffusers

    cls, part = getattr(diffusers, PIPELINES[name][0]), PIPELINES[name][1]
    needed = [key for key, value in inspect.signature(cls.__init__).parameters.items()
              if key != "self" and value.default is inspect.Parameter.empty]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return cls(**(dict.fromkeys(needed) | {part: model, "scheduler": scheduler})), part


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module, dict]:
    model, inputs = MODELS[request.param]()
    nq.quantize(model, "rtn-int4")
    return request.param, model, inputs


def test_every_pipeline(family: tuple, tmp_path: Any) -> None:
    name, model, inputs = family
    model = copy.deepcopy(model)
    pipe, part = pipeline(name, model)
    before = run(model, inputs)
    names = [*quantized(model), *dense(model)[:1]]
    save_file(toy(model, names, prefix=f"{part}."), tmp_path / "style.safetensors")
    report = pipe.load_lora_weights(str(tmp_path / "style.safetensors"), adapter_name="style")
    assert report.modules == {part: len(names)} and f"{len(names)} of {len(names)} modules" in str(report)
    style = run(model, inputs)
    assert relative(style, before) > 0.01
    pipe.load_lora_weights(toy(model, names, rank=2, seed=1, prefix=f"{part}."), adapter_name="other")
    pipe.set_adapters(["style", "other"], [1.0, 0.0])
    assert torch.equal(run(model, inputs), style)
    assert pipe.get_active_adapters() == ["style", "other"] and pipe.get_list_adapters() == {part: ["style", "other"]}
    pipe.disable_lora()
    assert torch.equal(run(model, inputs), before)
    pipe.enable_lora()
    pipe.delete_adapters("other")
    pipe.unload_lora_weights()
    assert torch.equal(run(model, inputs), before) and pipe.get_list_adapters() == {}


# -------------------------------------------------------------------------------------------------------- whole or not
@pytest.fixture
def flux() -> tuple[Any, nn.Module, dict]:
    model, inputs = MODELS["flux"]()
    nq.quantize(model, "rtn-int4")
    return pipeline("flux", model)[0], model, inputs


def without(state: State, ending: str) -> State:
    key = next(key for key in state if key.endswith(ending))
    return {name: tensor for name, tensor in state.items() if name != key}


def changed(state: State, ending: str, change: Any) -> State:
    key = next(key for key in state if key.endswith(ending))
    return state | {key: change(state[key])}


def other_model(state: State) -> State:
    return {key: tensor.repeat(*((1, 2) if "lora_A" in key else (2, 1))) for key, tensor in state.items()}


BROKEN = {
    "half of a pair": (lambda s: without(s, "lora_B.weight"), "half of a pair is missing.*lora_A"),
    "the other half": (lambda s: without(s, "lora_A.weight"), "half of a pair is missing.*lora_B"),
    "wrong width": (lambda s: changed(s, "lora_A.weight", lambda t: t[:, :-8]), "shapes do not fit.*lora_A"),
    "ranks that differ": (lambda s: changed(s, "lora_B.weight", lambda t: t[:, :-1]), "shapes do not fit.*lora_B"),
    "another model": (other_model, "is for another model"),
    "an unknown key": (lambda s: s | {"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(4, 128),
                                     "transformer.transformer_blocks.9.attn.to_q.lora_B.weight": torch.ones(128, 4)},
                       "2 keys for which FluxTransformer2DModel has no module: transformer.transformer_blocks.9"),
    "a norm": (lambda s: s | {"transformer.transformer_blocks.0.attn.norm_q.diff": torch.ones(64)}, "norm_q.diff"),
    "NaN": (lambda s: changed(s, "lora_A.weight", lambda t: t * torch.nan), "NaN"),
    "infinity": (lambda s: changed(s, "lora_B.weight", lambda t: t / 0), "infinite"),
    "no LoRA": (lambda s: {"some.weight": torch.ones(2, 2)}, "no key is one of a LoRA"),
    "nothing": (lambda s: {}, "no key is one of a LoRA"),
    "only another encoder": (lambda s: {"lora_te3_x.lora_down.weight": torch.ones(2, 8),
                                        "lora_te3_x.lora_up.weight": torch.ones(8, 2)}, "changes no module"),
    "integers": (lambda s: changed(s, "lora_A.weight", lambda t: t.int()), "expected floating point"),
    "a strength that is none": (lambda s: s | {f"{next(iter(s)).removesuffix('.lora_A.weight')}.alpha":
                                               torch.tensor(float("nan"))}, "alpha"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("first", [True, False])
def test_broken_files_leave_nothing(flux: tuple, case: str, first: bool) -> None:
    pipe, model, inputs = flux
    if not first:
        pipe.load_lora_weights(toy(model, quantized(model), seed=5, prefix="transformer."), adapter_name="good")
    before, held = run(model, inputs), {name for name, _ in model.named_modules()}
    breaks, sentence = BROKEN[case]
    state = breaks(toy(model, quantized(model), prefix="transformer."))
    with pytest.raises(NunchakuError, match=f"(?s){sentence}"):
        pipe.load_lora_weights(state, adapter_name="bad")
    assert {name for name, _ in model.named_modules()} == held
    assert pipe.get_list_adapters() == ({} if first else {"transformer": ["good"]})
    assert torch.equal(run(model, inputs), before)
    pipe.load_lora_weights(toy(model, quantized(model), prefix="transformer."), adapter_name="bad")
    assert not torch.equal(run(model, inputs), before)


def test_what_goes_wrong_later_is_undone(flux: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while diffusers attaches the adapter."""
    import peft

    pipe, model, inputs = flux
    before, held = run(model, inputs), {name for name, _ in model.named_modules()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(peft, "set_peft_model_state_dict", interrupted)
        pipe.load_lora_weights(toy(model, quantized(model), prefix="transformer."), adapter_name="style")
    assert {name for name, _ in model.named_modules()} == held and torch.equal(run(model, inputs), before)
    pipe.load_lora_weights(toy(model, quantized(model), prefix="transformer."), adapter_name="style")
    assert not torch.equal(run(model, inputs), before)


def test_files_that_are_none(flux: tuple, tmp_path: Any) -> None:
    pipe, model, _ = flux
    whole = tmp_path / "whole.safetensors"
    save_file(toy(model, quantized(model), prefix="transformer."), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(NunchakuError, match="cut.safetensors: not a readable safetensors file"):
        pipe.load_lora_weights(str(cut))
    with pytest.raises(OSError):
        pipe.load_lora_weights(str(tmp_path), weight_name="missing.safetensors", local_files_only=True)
    assert pipe.get_list_adapters() == {}


def test_a_part_if_asked_for(flux: tuple, caplog: pytest.LogCaptureFixture) -> None:
    pipe, model, _ = flux
    names = quantized(model)
    state = toy(model, names, prefix="transformer.") | {"transformer.nowhere.lora_A.weight": torch.ones(2, 4),
                                                        "transformer.nowhere.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(NunchakuError, match="allow_partial=True"):
        pipe.load_lora_weights(state)
    with caplog.at_level(logging.WARNING, "nunchaku_py"):
        report = pipe.load_lora_weights(state, adapter_name="style", allow_partial=True)
    assert report.modules == {"transformer": len(names)} and "2 keys found no module" in str(report)
    assert "transformer.nowhere" in caplog.text


def test_keys_of_text_encoders_that_are_not_there(flux: tuple, caplog: pytest.LogCaptureFixture) -> None:
    pipe, model, _ = flux
    state = toy(model, quantized(model), prefix="transformer.") | {
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4),
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(4, 2)}
    with caplog.at_level(logging.WARNING, "nunchaku_py"):
        assert "2 keys are for text encoders that are not there" in str(pipe.load_lora_weights(state))


def test_a_name_that_is_taken(flux: tuple) -> None:
    pipe, model, inputs = flux
    state = toy(model, quantized(model), prefix="transformer.")
    pipe.load_lora_weights(state, adapter_name="style")
    before = run(model, inputs)
    with pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(state, adapter_name="style")
    assert torch.equal(run(model, inputs), before) and pipe.get_list_adapters() == {"transformer": ["style"]}


# ------------------------------------------------------------------------------------------------- strengths of files
def test_alphas_and_ranks_of_every_module(flux: tuple) -> None:
    pipe, model, _ = flux
    state: State = {}
    wanted = {}
    for i, name in enumerate(quantized(model)):
        rank = 2 + i % 3
        state |= toy(model, [name], rank=rank, seed=i, prefix="transformer.")
        if i % 2:
            state[f"transformer.{name}.alpha"] = torch.tensor(1.5 * i)
        wanted[name] = 1.5 * i / rank if i % 2 else 1.0
    pipe.load_lora_weights(state, adapter_name="style")
    for name, scale in wanted.items():
        assert model.get_submodule(name).scaling["style"] == pytest.approx(scale)


def test_strengths_in_metadata(flux: tuple, tmp_path: Any) -> None:
    """As diffusers writes them beside adapters that were trained with PEFT: alpha, patterns, rank stabilization."""
    from peft import LoraConfig

    pipe, model, inputs = flux
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "to_k"],
                                 alpha_pattern={"to_k": 2}, init_lora_weights=False), "style")
    after = run(model, inputs)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.unload_lora()
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="again")
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.scaling["again"] == pytest.approx(3.0) and relative(run(model, inputs), after) < 1e-2


def test_pipelines_without_quantized_models_are_left_alone() -> None:
    model, inputs = MODELS["flux"]()
    pipe, _ = pipeline("flux", model)
    before = run(model, inputs)
    state = toy(model, ["transformer_blocks.0.attn.to_q"], prefix="transformer.")
    assert pipe.load_lora_weights(state, adapter_name="style") is None
    assert not torch.equal(run(model, inputs), before)
    pipe.unload_lora_weights()
    assert torch.equal(run(model, inputs), before)


# ------------------------------------------------------------------------------------------------------------- formats
FORMATS = {
    "kohya": (flattened("lora_unet_"), KOHYA), "ComfyUI": (prefixed("diffusion_model."), KOHYA),
    "ai-toolkit": (prefixed("diffusion_model."), PEFT), "fal Kontext": (prefixed("base_model.model."), PEFT),
}


def test_every_format_gives_the_same_bits(flux: tuple, tmp_path: Any) -> None:
    """A LoRA in diffusers' names and in BFL's, as files, with PEFT's own weights and the model's output compared."""
    pipe, model, inputs = flux
    target = target_of(model)
    table = blocks(FLUX_FUSED, target)
    lora = lora_of(table, target, alpha=2.0)
    small = {name: replace(delta, up=delta.up * 0.05) for name, delta in lora.items()}
    files = {"PEFT": write(small, prefixed("transformer.")), "OneTrainer": write(
        small, flattened("lora_transformer_"), KOHYA)}
    files |= {name: write_fused(small, table, *spelling) for name, spelling in FORMATS.items()}
    before, seen = run(model, inputs), {}
    for name, state in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.clone() for key, tensor in state.items()}, path)
        pipe.load_lora_weights(str(path), adapter_name="style")
        weights = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
        scales = {key: dict(layer.scaling) for key, layer in model.named_modules() if hasattr(layer, "scaling")}
        seen[name] = weights, scales, run(model, inputs)
        pipe.unload_lora_weights()
        assert torch.equal(run(model, inputs), before)
    weights, scales, output = seen["PEFT"]
    assert relative(output, before) > 0.01 and len(weights) == 2 * len(small)
    for other_weights, other_scales, other_output in seen.values():
        assert other_weights.keys() == weights.keys() and other_scales == scales
        assert all(torch.equal(other_weights[key], tensor) for key, tensor in weights.items())
        assert torch.equal(other_output, output)


def test_control_loras_widen_the_embedder(flux: tuple) -> None:
    """By diffusers, which also takes them back."""
    pipe, model, inputs = flux
    before, width = run(model, inputs), model.x_embedder.in_features
    state = toy(model, quantized(model), prefix="transformer.")
    state["transformer.x_embedder.lora_A.weight"] = normal(4, 2 * width, seed=5)
    state["transformer.x_embedder.lora_B.weight"] = normal(128, 4, seed=6)
    state["transformer.transformer_blocks.0.attn.norm_q.weight"] = torch.full((64,), 1.5, dtype=torch.bfloat16)
    report = pipe.load_lora_weights(state, adapter_name="control")
    assert "control" in report.format and report.modules == {"transformer": len(quantized(model)) + 1}
    wide = {**inputs, "hidden_states": torch.cat([inputs["hidden_states"]] * 2, -1)}
    assert model.x_embedder.in_features == 2 * width and relative(run(model, wide), before) > 0.01
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    assert torch.equal(run(model, inputs), before)


def test_lycoris(flux: tuple) -> None:
    """LoHa and LoKr as diffusers cannot load them: by the weights' change, computed in full."""
    pipe, model, _ = flux
    name = "transformer_blocks.0.attn.to_q"
    factors = {part: normal(*shape, seed=i, size=0.3) for i, (part, shape) in enumerate({
        "hada_w1_a": (128, 4), "hada_w1_b": (4, 128), "hada_w2_a": (128, 4), "hada_w2_b": (4, 128)}.items())}
    state = {f"lora_unet_{name.replace('.', '_')}.{part}": tensor for part, tensor in factors.items()}
    site = model.get_submodule(name)
    before = site.effective_weight()
    report = pipe.load_lora_weights(state | {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(2.0)})
    assert report.ranks == {16: 1} and "LoHa" in str(report)
    w = {part: tensor.double() for part, tensor in factors.items()}
    change = 0.5 * (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])
    assert relative(site.effective_weight() - before, change) < 0.01
    pipe.unload_lora_weights()
    whole = {f"lora_unet_{name.replace('.', '_')}.lokr_w1": normal(8, 8, seed=1),
             f"lora_unet_{name.replace('.', '_')}.lokr_w2": normal(16, 16, seed=2)}
    with pytest.raises(NunchakuError, match="need rank 128, and rank 64 would keep.* max_rank=128"):
        pipe.load_lora_weights(whole, max_rank=64)
    pipe.load_lora_weights(whole)
    change = torch.kron(normal(8, 8, seed=1).double(), normal(16, 16, seed=2).double())
    assert relative(site.effective_weight() - before, change) < 0.01
