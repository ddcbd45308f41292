"""Puts the trained weights where the package ships them: `python -m benchmarks.training.ship`.

Pipelines as 16-bit safetensors in diffusers' own folders, the checker as one file, and the log of each run.
"""
from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nunchaku_py.demo import checker, shipped

from . import flux, sdxl
from .checker import trained as trained_checker
from .latents import encoded
from .loop import OUT, averaged
from .text_models import clip_tokenizer, t5_tokenizer
from .vae import trained as trained_vae

LOGS = Path("benchmarks/training/logs")
LIMIT = 12e6  # bytes of a pipeline, everything in it counted


def flux_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    drawer = _filled(flux.fresh(), "flux")
    vae, known = trained_vae("flux"), encoded("flux")
    vae.register_to_config(scaling_factor=known.scale, shift_factor=known.shift)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=drawer.transformer,
        text_encoder=drawer.clip, tokenizer=clip_tokenizer(), text_encoder_2=drawer.t5, tokenizer_2=t5_tokenizer())


def sdxl_pipeline() -> Any:
    """StableDiffusionXLPipeline knows no shift_factor, and latents_mean for four channels only: the convolutions around
    the latents, which SDXL's autoencoder has, say the shift."""
    from diffusers import StableDiffusionXLPipeline

    drawer = _filled(sdxl.fresh(), "sdxl")
    known = encoded("sdxl")
    vae = _shifted(trained_vae("sdxl"), known.shift)
    vae.register_to_config(scaling_factor=known.scale, shift_factor=None, force_upcast=False)
    return StableDiffusionXLPipeline(
        scheduler=sdxl.scheduler(), vae=vae, unet=drawer.unet, text_encoder=drawer.clip, tokenizer=clip_tokenizer(),
        text_encoder_2=drawer.wide_clip, tokenizer_2=clip_tokenizer(), force_zeros_for_empty_prompt=False,
        add_watermarker=False)


@torch.no_grad()
def _shifted(vae: nn.Module, shift: float) -> nn.Module:
    """The same autoencoder with latents less `shift`."""
    channels = vae.config.latent_channels
    vae.register_to_config(use_quant_conv=True, use_post_quant_conv=True)
    vae.quant_conv, vae.post_quant_conv = (nn.Conv2d(width, width, 1) for width in (2 * channels, channels))
    for part, by in ((vae.quant_conv, -shift), (vae.post_quant_conv, shift)):
        nn.init.dirac_(part.weight)
        part.bias.zero_()
        part.bias[:channels] = by
    return vae


PIPELINES = {"tiny-flux": flux_pipeline, "tiny-sdxl": sdxl_pipeline}


def _filled(drawer: nn.Module, run: str) -> nn.Module:
    drawer.load_state_dict(averaged(run))
    return drawer.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*PIPELINES, "checker", []], help="default: everything")
    chosen = parser.parse_args().what or [*PIPELINES, "checker"]
    for name in chosen:
        if name == "checker":
            _ship_checker()
        else:
            _ship_pipeline(name)
    LOGS.mkdir(exist_ok=True)
    for log in OUT.glob("*/log.csv"):
        shutil.copy(log, LOGS / f"{log.parent.name}.csv")


def _ship_pipeline(name: str) -> None:
    folder, draft = shipped.WEIGHTS / name, OUT / "draft" / name
    shutil.rmtree(draft, ignore_errors=True)
    PIPELINES[name]().to(torch.bfloat16).save_pretrained(draft)
    for file in draft.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")
    if size > LIMIT:
        raise SystemExit(f"{name} is larger than {LIMIT / 1e6:.0f} MB")
    shutil.rmtree(folder, ignore_errors=True)
    shipped.WEIGHTS.mkdir(exist_ok=True)
    shutil.move(draft, folder)


def _ship_checker() -> None:
    from safetensors.torch import save_file

    values = {name: value.bfloat16() if value.is_floating_point() else value
              for name, value in trained_checker().state_dict().items()}
    save_file(values, checker.WEIGHTS)
    checker.WEIGHTS.chmod(0o644)
    print(f"{checker.WEIGHTS}: {checker.WEIGHTS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
