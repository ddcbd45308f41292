"""Do the models draw what held-out captions say? `python -m benchmarks.training.evaluate tiny-flux`.

Every caption names a pair of colour and shape that training never showed. `--running` takes the weights of the training
runs as they are now instead of the shipped ones; `--sheet` writes the pictures, wrong ones with a red rim.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nunchaku_py.demo import shipped
from nunchaku_py.demo.checker import agreement, load_checker
from nunchaku_py.demo.measure import paint, psnr
from nunchaku_py.demo.render import render
from nunchaku_py.demo.scenes import Scene, described, read

from .loop import DEVICE

CAPTION_SEED, COLUMNS = 2024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=shipped.CALLS)
    parser.add_argument("--running", action="store_true")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scenes, captions = described(arguments.count, CAPTION_SEED, held_out=True)
    pipe = _pipeline(arguments.name, arguments.running).to(DEVICE)
    print(_ceiling(pipe.vae, scenes, captions), flush=True)
    right, pictures = _measured(pipe, captions, _call(arguments))
    for count, wanted in _by_count(captions, right).items():
        print(f"{count} thing{'s' * (count > 1)}: {100 * sum(wanted) / len(wanted):.1f} % of {len(wanted)}")
    print(f"{arguments.name}: {100 * sum(right) / len(right):.1f} % of {len(right)} held-out captions")
    if arguments.sheet:
        _sheet(pictures, right).save(arguments.sheet)


def _pipeline(name: str, running: bool) -> Any:
    if not running:
        return shipped.pipeline(name)
    from .ship import PIPELINES

    pipe = PIPELINES[name]().to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _call(arguments: argparse.Namespace) -> dict[str, Any]:
    call = dict(shipped.CALLS[arguments.name])
    if arguments.steps:
        call["num_inference_steps"] = arguments.steps
    if arguments.guidance:
        call["true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"] = arguments.guidance
    return call


def _measured(pipe: Any, captions: Sequence[str], call: dict[str, Any]) -> tuple[list[bool], Tensor]:
    pictures = paint(pipe, captions, 0, call).cpu()
    return agreement(load_checker(), pictures, captions), pictures


@torch.inference_mode()
def _ceiling(vae: torch.nn.Module, scenes: Sequence[Scene], captions: Sequence[str]) -> str:
    """What the autoencoder alone makes of the real pictures: a denoiser can hardly do better."""
    wanted = render(scenes)
    latents = vae.encode((wanted * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
    made = (vae.decode(latents).sample.float().cpu() * 0.5 + 0.5).clamp(0, 1)
    right = agreement(load_checker(), made, captions)
    return f"autoencoder alone: {100 * sum(right) / len(right):.1f} %, {psnr(made, wanted).mean():.1f} dB"


def _by_count(captions: Sequence[str], right: Sequence[bool]) -> dict[int, list[bool]]:
    found: dict[int, list[bool]] = {}
    for caption, good in zip(captions, right, strict=True):
        found.setdefault(len(read(caption).things), []).append(good)
    return dict(sorted(found.items()))


def _sheet(pictures: Tensor, right: Sequence[bool]) -> Any:
    from PIL import Image

    framed = torch.nn.functional.pad(pictures, (2, 2, 2, 2), value=1.0)
    for i, good in enumerate(right):
        if not good:
            framed[i, 1:, :2] = framed[i, 1:, -2:] = framed[i, 1:, :, :2] = framed[i, 1:, :, -2:] = 0
    count, channels, height, width = framed.shape
    framed = torch.cat([framed, torch.ones(-count % COLUMNS, channels, height, width)])
    rows = framed.reshape(-1, COLUMNS, channels, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray((rows.reshape(-1, COLUMNS * width, channels) * 255).byte().numpy())


if __name__ == "__main__":
    main()
