"""LoRAs for the shipped models, trained the ordinary way with PEFT:

    python -m benchmarks.training.lora tiny-flux-neon

A style (outlines that glow at night, 'in neon style') and a new thing (hearts, which no base model has seen). Saved
where the package ships them, as diffusers saves them, for `pipe.load_lora_weights`.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nunchaku_py.demo import shipped
from nunchaku_py.demo.render import render, render_neon
from nunchaku_py.demo.scenes import NEW_SHAPES, SHAPES, Scene, draw

from . import captions as texts
from . import flux, layout, sdxl, together
from .latents import Examples
from .loop import DEVICE, Plan, Run, averaged, parser, prepared

PLAN = Plan(steps=500, batch=48, rate=2e-3, warmup=50, fall=0.6, average=0.98)
RANK, SCENES, SCENE_SEED, BATCH = 8, 2400, 31, 100
ORDINARY = 0.2  # part of the scenes without a heart: what the model knew is to stay
TARGETS = {
    "tiny-flux": r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|"
                 r"ff(_context)?\.net\.(0\.proj|2))",
    "tiny-sdxl": r".*\.(to_[qkv]|to_out\.0|ff\.net\.(0\.proj|2)|proj_in|proj_out)",
}


@dataclass(frozen=True)
class Lora:
    """What it learns from."""

    scene: Callable[[random.Random], Scene]
    render: Callable[[Sequence[Scene]], Tensor]
    suffix: str = ""


def _with_hearts(chance: random.Random) -> Scene:
    if chance.random() < ORDINARY:
        return draw(chance)
    while True:
        scene = draw(chance, shapes=SHAPES + 3 * NEW_SHAPES)
        if any(thing.shape in NEW_SHAPES for thing in scene.things):
            return scene


LORAS = {
    "tiny-flux-neon": Lora(draw, render_neon, " in neon style"),
    "tiny-flux-heart": Lora(_with_hearts, render),
    "tiny-sdxl-neon": Lora(draw, render_neon, " in neon style"),
}


def examples(lora: Lora, vae: nn.Module) -> Examples:
    chance = random.Random(SCENE_SEED)
    scenes = [lora.scene(chance) for _ in range(SCENES)]
    sentences = [caption + lora.suffix for caption in texts.captions(scenes)]
    return Examples(torch.cat([_latents(lora.render(scenes[i:i + BATCH]), vae) for i in range(0, SCENES, BATCH)]),
                    layout.maps(SCENES * [Scene((), "", "")]), texts.tokens(sentences), texts.tokens([""]))


@torch.inference_mode()
def _latents(pictures: Tensor, vae: nn.Module) -> Tensor:
    mean = vae.encode(pictures * 2 - 1).latent_dist.mean
    return ((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).half()


def adapted(base: str, prepare: Callable[[Any], None] = lambda pipe: None) -> tuple[Any, nn.Module]:
    """(pipeline, what is trained): the pipeline's denoiser with an adapter, in fp32, everything else frozen. `prepare`
    may do something to the pipeline before."""
    from peft import LoraConfig

    pipe = shipped.pipeline(base, torch.float32).to(DEVICE)
    prepare(pipe)
    denoiser = getattr(pipe, shipped.DENOISERS[base])
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, denoiser):
        part.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS[base]))
    if base == "tiny-flux":
        return pipe, flux.Drawer(pipe.text_encoder_2, pipe.text_encoder, denoiser)
    return pipe, sdxl.Drawer(pipe.text_encoder, pipe.text_encoder_2, denoiser)


def resumed(name: str, drawer: nn.Module, plan: Plan) -> Run:
    """The run, which holds the base model too: one of other weights is no start, and its adapter would not fit."""
    base = {key: value.clone() for key, value in drawer.state_dict().items() if _of_base(key)}
    run = Run(name, drawer, plan)
    if not all(torch.equal(value, base[key]) for key, value in drawer.state_dict().items() if _of_base(key)):
        raise SystemExit(f"{run.folder}: was trained on other weights of {shipped.LORAS[name]}; "
                         "delete it to begin again")
    return run


def _of_base(key: str) -> bool:
    return "lora_" not in key and not key.startswith("question.")


def save(name: str, pipe: Any, drawer: nn.Module) -> None:
    """The moving average of the adapter, in 16 bit."""
    from peft import get_peft_model_state_dict

    drawer.load_state_dict(averaged(name))
    part = shipped.DENOISERS[shipped.LORAS[name]]
    adapter = get_peft_model_state_dict(getattr(pipe, part))
    layers = {key: value.bfloat16().contiguous() for key, value in adapter.items()}
    folder = shipped.WEIGHTS / "loras"
    type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": layers}, weight_name=f"{name}.safetensors")
    file = folder / f"{name}.safetensors"
    file.chmod(0o644)
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    options = parser(__doc__, PLAN)
    options.add_argument("name", choices=LORAS)
    arguments = options.parse_args()
    plan = prepared(arguments, PLAN)
    base = shipped.LORAS[arguments.name]
    pipe, drawer = adapted(base)
    data = examples(LORAS[arguments.name], pipe.vae)
    run = resumed(arguments.name, drawer, plan)
    kept = sdxl.kept()

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if base == "tiny-flux":
            return flux.losses(drawer, data, plan.batch, generator)[0], {}
        return sdxl.losses(drawer, kept, data, plan.batch, generator)[0], {}

    run.train(loss)
    save(arguments.name, pipe, drawer)


if __name__ == "__main__":
    together.run(main)
