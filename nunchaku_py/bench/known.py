"""Real models by name, as data: the arguments that make them of diffusers' classes, and what one step calls them with.

Without torch, so that the command line looks names up at once. tests/bench/test_models.py builds each on the meta
device and counts its parameters.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """A denoiser. Where its class defaults to the model, `config` is empty.

    steps: of an image, the default of its pipeline or, where it is distilled, what its authors name; text: tokens of a
    prompt, as the pipeline pads it (Qwen-Image and Z-Image do not pad: a prompt of some sentences); batch: samples of a
    call, 2 where guidance adds one; calls: in one step; unit: what sides of an image are multiples of.
    """

    about: str
    cls: str
    config: dict[str, Any]
    parameters: float  # in billions
    steps: int
    text: int
    batch: int = 1
    calls: int = 1
    unit: int = 16
    side: int = 1024  # that it was made for


_SD3 = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192}
KNOWN: dict[str, Known] = {
    "flux.1-dev": Known("FLUX.1-dev", "FluxTransformer2DModel", {"guidance_embeds": True}, 11.90, 28, 512),
    "flux.1-schnell": Known("FLUX.1-schnell", "FluxTransformer2DModel", {"guidance_embeds": False}, 11.89, 4, 256),
    "qwen-image": Known("Qwen-Image", "QwenImageTransformer2DModel", {}, 20.43, 50, 128, calls=2),
    "sd3.5-large": Known("Stable Diffusion 3.5 large", "SD3Transformer2DModel", {
        **_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
        8.06, 28, 333, batch=2),
    "sd3-medium": Known("Stable Diffusion 3 medium", "SD3Transformer2DModel", {
        **_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}, 2.03, 28, 333, batch=2),
    "sdxl": Known("SDXL", "UNet2DConditionModel", {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}, 2.57, 50, 77, batch=2, unit=8),
    "pixart-sigma": Known("PixArt-Σ", "PixArtTransformer2DModel", {
        "caption_channels": 4096, "use_additional_conditions": False}, 0.61, 20, 300, batch=2),
    "sana-1.6b": Known("SANA 1.6B", "SanaTransformer2DModel", {}, 1.60, 20, 300, batch=2, unit=32),
    "z-image": Known("Z-Image", "ZImageTransformer2DModel", {}, 6.15, 50, 128, batch=2),
    "z-image-turbo": Known("Z-Image-Turbo", "ZImageTransformer2DModel", {}, 6.15, 9, 128),
}


def known_by_class(cls: str) -> Known | None:
    """The first of this class: how a model of it, whatever its size, is called."""
    return next((known for known in KNOWN.values() if known.cls == cls), None)
