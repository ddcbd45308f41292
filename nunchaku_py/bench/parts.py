"""What a pipeline has beside its denoiser, of models known by name: text encoders and decoder, as data, and their time.

Only of models whose parts are known for certain. They are the same for every contender, in 16 bit, and run once an
image. Without torch until something is measured.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .job import Job

Told = Callable[[str], None]
TEXT, DECODER = "text", "decoder"


@dataclass(frozen=True)
class Part:
    """`size`: tokens of a text encoder; channels of the latent of a decoder, whose side is 1/8 of the image's."""

    role: str
    config: dict[str, Any]
    size: int


def clip(width: int, layers: int, heads: int, activation: str, cls: str) -> Part:
    return Part(TEXT, {"architectures": [cls], "hidden_size": width, "intermediate_size": 4 * width,
                       "num_hidden_layers": layers, "num_attention_heads": heads, "projection_dim": width,
                       "hidden_act": activation, "vocab_size": 49408}, 77)


def t5(tokens: int) -> Part:
    """T5-XXL's encoder."""
    return Part(TEXT, {"architectures": ["T5EncoderModel"], "d_model": 4096, "d_ff": 10240, "d_kv": 64,
                       "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu", "vocab_size": 32128},
                tokens)


def kl(channels: int, **more: Any) -> Part:
    return Part(DECODER, {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512],
                          "layers_per_block": 2, "latent_channels": channels,
                          "down_block_types": 4 * ["DownEncoderBlock2D"], "up_block_types": 4 * ["UpDecoderBlock2D"],
                          **more}, channels)


PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
LATENT_4, LATENT_16 = kl(4), kl(16, use_quant_conv=False, use_post_quant_conv=False)
LARGE, LARGE_PROJECTED = (clip(768, 12, 12, "quick_gelu", cls) for cls in (PLAIN, PROJECTED))
BIG_G = clip(1280, 32, 20, "gelu", PROJECTED)
PARTS: dict[str, tuple[Part, ...]] = {
    "flux.1-dev": (LARGE, t5(512), LATENT_16), "flux.1-schnell": (LARGE, t5(256), LATENT_16),
    "sdxl": (LARGE, BIG_G, LATENT_4), "pixart-sigma": (t5(300), LATENT_4),
    "sd3-medium": (LARGE_PROJECTED, BIG_G, t5(256), LATENT_16),
    "sd3.5-large": (LARGE_PROJECTED, BIG_G, t5(256), LATENT_16)}


def measure_parts(job: Job, told: Told) -> dict[str, float]:
    """Role → seconds of all its parts, each made, run twice, of which the faster counts, and forgotten."""
    took = {TEXT: 0.0, DECODER: 0.0}
    for part in PARTS[job.name]:
        took[part.role] += seconds_of(part, job, told)
    return took


def empty_part(part: Part) -> Any:
    """Without data; a table of words that is used twice is one tensor."""
    from .random_models import meta_model

    model = meta_model(part.config, part.role)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def seconds_of(part: Part, job: Job, told: Told) -> float:
    import torch

    from ..errors import NunchakuError
    from . import machine
    from .random_models import random_model

    name = part.config.get("_class_name") or part.config["architectures"][0]
    empty = empty_part(part)
    needs, left = 2 * sum(parameter.numel() for parameter in empty.parameters()), machine.memory_left()
    if job.device == "cpu" and needs > left:
        raise NunchakuError(f"{name} does not fit: needs {needs / 1e9:.2f} GB, {left / 1e9:.2f} GB are free")
    told(f"making {name}, {needs / 1e9:.2f} GB")
    model = random_model(empty, 1, job.device)
    with torch.no_grad():
        return min(_once(model, part, job) for _ in range(2))


def _once(model: Any, part: Part, job: Job) -> float:
    import torch

    batch, kind = job.batch, {"device": job.device}
    if part.role == TEXT:
        given, run = torch.randint(1000, (batch, part.size), **kind), model
    else:
        given = torch.randn(1, part.size, job.height // 8, job.width // 8, dtype=torch.bfloat16, **kind)
        run = model.decode
    wait = torch.cuda.synchronize if job.device.startswith("cuda") else (lambda: None)
    wait()
    started = time.perf_counter()
    run(given)
    wait()
    return time.perf_counter() - started
