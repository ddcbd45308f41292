"""The trained miniatures that come with the package: pipelines one loads like any other, and their LoRAs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import NunchakuError

WEIGHTS = Path(__file__).parent / "weights"
# What each pipeline is called with; the prompt and the generator are the caller's.
CALLS: dict[str, dict[str, Any]] = {
    "tiny-flux": {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 32,
                  "negative_prompt": "", "true_cfg_scale": 3.0},
    "tiny-sdxl": {"height": 64, "width": 64, "num_inference_steps": 20, "guidance_scale": 4.0},
}
DENOISERS = {"tiny-flux": "transformer", "tiny-sdxl": "unet"}


def pipeline(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The 16-bit diffusers pipeline of this name."""
    from diffusers import DiffusionPipeline

    if name not in CALLS:
        raise NunchakuError(f"no shipped pipeline is called '{name}'; there are {' and '.join(CALLS)}")
    folder = WEIGHTS / name
    if not (folder / "model_index.json").exists():
        raise NunchakuError(f"{folder}: the shipped weights are missing; reinstall nunchaku-py")
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
