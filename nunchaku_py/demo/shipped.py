"""The trained miniatures that come with the package: pipelines one loads like any other, and their LoRAs."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NunchakuError

if TYPE_CHECKING:  # commands look names up here: quick, without torch
    import torch

WEIGHTS = Path(__file__).parent / "weights"
# What each pipeline is called with; the prompt and the generator are the caller's.
CALLS: dict[str, dict[str, Any]] = {
    "tiny-flux": {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 32,
                  "negative_prompt": "", "true_cfg_scale": 3.0},
    "tiny-sdxl": {"height": 64, "width": 64, "num_inference_steps": 20, "guidance_scale": 4.0},
}
DENOISERS = {"tiny-flux": "transformer", "tiny-sdxl": "unet"}
# LoRA → the pipeline it is for.
LORAS = {"tiny-flux-neon": "tiny-flux", "tiny-flux-heart": "tiny-flux", "tiny-sdxl-neon": "tiny-sdxl"}


def folder(name: str) -> Path:
    """Where the pipeline of this name lies."""
    if name not in CALLS:
        raise NunchakuError(f"no shipped pipeline is called '{name}'; there are {' and '.join(CALLS)}")
    found = WEIGHTS / name
    if not (found / "model_index.json").exists():
        raise NunchakuError(f"{found}: the shipped weights are missing; reinstall nunchaku-py")
    return found


def lora(name: str) -> Path:
    """The LoRA of this name, a file for `pipe.load_lora_weights`."""
    if name not in LORAS:
        raise NunchakuError(f"no shipped LoRA is called '{name}'; there are {', '.join(LORAS)}")
    found = WEIGHTS / "loras" / f"{name}.safetensors"
    if not found.exists():
        raise NunchakuError(f"{found}: the shipped weights are missing; reinstall nunchaku-py")
    return found


def pipeline(name: str, dtype: torch.dtype | None = None) -> Any:
    """The diffusers pipeline of this name, in bfloat16 unless told otherwise."""
    import torch
    from diffusers import DiffusionPipeline

    from ..checkpoint.own import dtype_argument

    pipe = DiffusionPipeline.from_pretrained(folder(name), **dtype_argument(dtype or torch.bfloat16),
                                             local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
