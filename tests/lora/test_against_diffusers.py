"""Our reading of a file changes what the converters of diffusers' loaders change, by the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    ZImagePipeline,
)

from nunchaku_py.lora.formats import Target, read
from tests.lora.test_formats import sdxl_foreign
from tests.lora.writers import (
    FLUX2_FUSED,
    FLUX_FUSED,
    KOHYA,
    PEFT,
    WAN_FUSED,
    XLABS,
    Z_IMAGE_FUSED,
    blocks,
    change,
    flattened,
    lora_of,
    prefixed,
    random_lora,
    target_of,
    write,
    write_fused,
)
from tests.tiny import MODELS

WIDTH = 3072  # of FLUX.1, which its converter takes for granted
REAL = Target("FluxTransformer2DModel", {name: shape for name, shape in {
    **{f"transformer_blocks.0.attn.{n}": (WIDTH, WIDTH) for n in (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{f"transformer_blocks.0.{n}.net.0.proj": (4 * WIDTH, WIDTH) for n in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{n}.net.2": (WIDTH, 4 * WIDTH) for n in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{n}.linear": (6 * WIDTH, WIDTH) for n in ("norm1", "norm1_context")},
    **{f"single_transformer_blocks.0.attn.to_{n}": (WIDTH, WIDTH) for n in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (4 * WIDTH, WIDTH),
    "single_transformer_blocks.0.proj_out": (WIDTH, 5 * WIDTH),
    "single_transformer_blocks.0.norm.linear": (3 * WIDTH, WIDTH),
}.items()})


def compare(state: dict, target: Target, theirs_state: dict, component: str = "transformer",
            alphas: dict | None = None) -> None:
    """Of every module: alpha/r · up·down of ours, and theirs, which has alpha in the weights or, of UNets, beside."""
    deltas = read(state, {component: target}).deltas[component]
    theirs = {}
    for key, up in theirs_state.items():
        for ending, down_ending in ((".lora_B.weight", ".lora_A.weight"), (".lora.up.weight", ".lora.down.weight"),
                                    ("_lora.up.weight", "_lora.down.weight")):
            if key.endswith(ending):
                stem = key.removesuffix(ending)
                down = theirs_state[stem + down_ending]
                scale = 1.0 if not alphas else alphas[f"{stem.removesuffix('_lora')}.alpha"] / down.shape[0]
                theirs[stem.removeprefix(f"{component}.")] = (scale, up, down)
    assert set(theirs) == set(deltas)
    for name, (scale, up, down) in theirs.items():
        probe = torch.linspace(-1, 1, deltas[name].down[0].numel(), dtype=torch.float64)  # no dense 12288 x 3072 here
        got = deltas[name].alpha / deltas[name].rank * (
            deltas[name].up.double().flatten(1) @ (deltas[name].down.double().flatten(1) @ probe))
        want = scale * (up.double().flatten(1) @ (down.double().flatten(1) @ probe))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), name


def converted(pipeline: type, state: dict) -> dict:
    """Copies, since some converters scale in place."""
    return pipeline.lora_state_dict({key: tensor.clone() for key, tensor in state.items()})


def saved(table: dict, target: Target, name: object, parts: tuple[str, str], alpha: str | None = ".alpha") -> dict:
    table = blocks(table, target)
    return write_fused(lora_of(table, target, dtype=torch.float32), table, name, parts, alpha)


def test_flux() -> None:
    for state in (saved(FLUX_FUSED, REAL, flattened("lora_unet_"), KOHYA),
                  saved(FLUX_FUSED, REAL, prefixed("diffusion_model."), KOHYA),
                  saved(XLABS, REAL, prefixed(""), (".down.weight", ".up.weight"), None)):
        compare(state, REAL, converted(FluxPipeline, state))


def test_flux_joined_by_kohya() -> None:
    modules = [f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"] + ["single_transformer_blocks.0.proj_mlp"]
    lora = random_lora({name: REAL.shapes[name] for name in modules}, dtype=torch.float32)
    state = {"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.cat([lora[name].down for name in modules]),
             "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.block_diag(*(lora[n].up for n in modules)),
             "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(8.0)}
    compare(state, REAL, converted(FluxPipeline, state))


@pytest.mark.parametrize(("model", "pipeline", "table", "name", "parts", "alpha"), [
    ("flux2", Flux2Pipeline, FLUX2_FUSED, prefixed("diffusion_model."), PEFT, None),
    ("flux2", Flux2Pipeline, FLUX2_FUSED, flattened("lora_unet_"), KOHYA, ".alpha"),
    ("wan", WanPipeline, WAN_FUSED, prefixed("diffusion_model."), KOHYA, ".alpha"),
    ("wan", WanPipeline, WAN_FUSED, prefixed("diffusion_model."), PEFT, None),
    ("wan", WanPipeline, WAN_FUSED, flattened("lora_unet_"), KOHYA, ".alpha"),
])
def test_names_of_the_authors(model: str, pipeline: type, table: dict, name: object, parts: tuple[str, str],
                              alpha: str | None) -> None:
    target = target_of(MODELS[model]()[0])
    state = saved(table, target, name, parts, alpha)
    compare(state, target, converted(pipeline, state))


def test_z_image() -> None:
    target = target_of(MODELS["z_image"]()[0])
    state = saved(Z_IMAGE_FUSED, target, flattened("lora_unet_"), (".lora.down.weight", ".lora.up.weight"))
    compare(state, target, converted(ZImagePipeline, state))


def test_qwen_image() -> None:
    target = target_of(MODELS["qwen_image"]()[0])
    lora = random_lora({name: shape for name, shape in target.shapes.items()
                        if "attn" in name or "mlp" in name}, dtype=torch.float32)
    for name in (prefixed("diffusion_model."), flattened("lora_unet_")):
        state = write(lora, name, KOHYA)
        compare(state, target, converted(QwenImagePipeline, state))


def test_sdxl() -> None:
    """Of its attentions, which the converter of diffusers names without fail."""
    target = target_of(MODELS["sdxl"]()[0])
    lora = random_lora({name: shape for name, shape in target.shapes.items() if ".transformer_blocks." in name
                        and "ff" in name}, dtype=torch.float32)
    state = write(lora, sdxl_foreign, KOHYA)
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(
        dict(state), unet_config=SimpleNamespace(layers_per_block=1))
    compare(state, target, converted, "unet", alphas)


def test_the_change_is_scaled() -> None:
    lora = random_lora({"a": (6, 5)}, rank=4, alpha=2.0)
    assert torch.equal(change(lora["a"]), 0.5 * lora["a"].up.double() @ lora["a"].down.double())
