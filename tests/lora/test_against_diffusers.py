"""Our reading of a file changes what the converters of diffusers' loaders change, by the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
from torch import Tensor

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
REAL = Target("FluxTransformer2DModel", {
    **{f"transformer_blocks.0.attn.{n}": (WIDTH, WIDTH) for n in (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{f"transformer_blocks.0.{n}.net.0.proj": (4 * WIDTH, WIDTH) for n in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{n}.net.2": (WIDTH, 4 * WIDTH) for n in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{n}.linear": (6 * WIDTH, WIDTH) for n in ("norm1", "norm1_context")},
    **{f"single_transformer_blocks.0.attn.to_{n}": (WIDTH, WIDTH) for n in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (4 * WIDTH, WIDTH),
    "single_transformer_blocks.0.proj_out": (WIDTH, 5 * WIDTH),
    "single_transformer_blocks.0.norm.linear": (3 * WIDTH, WIDTH),
})


def compare(state: dict, target: Target, theirs: dict, component: str = "transformer", scale: float = 1.0) -> None:
    """Of every module: alpha/r · up·down of ours, and theirs, which has alpha in the weights or, of UNets, beside."""
    deltas = read(state, {component: target}).deltas[component]
    pairs = dict(_pairs(theirs, f"{component}."))
    assert set(pairs) == set(deltas)
    for name, (up, down) in pairs.items():
        probe = torch.linspace(-1, 1, down[0].numel(), dtype=torch.float64)  # a change of 12288 x 3072 is not made
        got = deltas[name].alpha / deltas[name].rank * _applied(deltas[name].up, deltas[name].down, probe)
        assert torch.allclose(got, scale * _applied(up, down, probe), rtol=1e-5, atol=1e-5), name


def _applied(up: Tensor, down: Tensor, probe: Tensor) -> Tensor:
    return up.double().flatten(1) @ (down.double().flatten(1) @ probe)


def _pairs(state: dict, prefix: str) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(module, (up, down)); of UNets the converter names the attention's linears as old processors did."""
    for key, up in state.items():
        for ending, other in ((".lora_B.weight", ".lora_A.weight"), (".lora.up.weight", ".lora.down.weight"),
                              ("_lora.up.weight", "_lora.down.weight")):
            if key.endswith(ending):
                name = key.removeprefix(prefix).removesuffix(ending)
                name = re.sub(r"\.processor\.to_out$", ".to_out.0", name)
                yield name.replace(".processor.", "."), (up, state[key.removesuffix(ending) + other])


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
    target = target_of(MODELS["sdxl"]()[0])
    state = write(random_lora(target.shapes, dtype=torch.float32), sdxl_foreign, KOHYA)
    theirs, alphas = StableDiffusionXLPipeline.lora_state_dict(
        dict(state), unet_config=SimpleNamespace(layers_per_block=1))
    assert set(alphas.values()) == {2.0}
    compare(state, target, theirs, "unet", scale=2.0 / 4)
    assert len(read(theirs, {"unet": target}).deltas["unet"]) == len(target.shapes)


def test_the_change_is_scaled() -> None:
    lora = random_lora({"a": (6, 5)}, rank=4, alpha=2.0)
    assert torch.equal(change(lora["a"]), 0.5 * lora["a"].up.double() @ lora["a"].down.double())
