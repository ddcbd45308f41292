"""Tiny pipelines with the arguments of a call; each runs in about a second on a CPU.

`output_type="latent"` unless the caller says otherwise: pass another one to see images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests import tiny_text
from tests.tiny_models import (
    DTYPE,
    POOLED,
    TEXT,
    TEXT_DIM,
    cast,
    flux,
    flux_config,
    flux_controlnet,
    normal,
    randomise,
    sdxl,
    sdxl_controlnet,
)

SIZE = 16  # pixels; FLUX's tiny VAE keeps the size, so this is 64 image tokens
PipelineCase = tuple[object, dict]


def flux_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=16,
        norm_num_groups=2,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    )
    return randomise(model, seed=4)


def sdxl_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=2 * SIZE,
        mid_block_add_attention=False,
    )
    return randomise(model, seed=4)


def image(size: int = SIZE, seed: int = 0):
    from PIL import Image

    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask(size: int = SIZE):
    from PIL import Image

    pixels = torch.zeros(size, size, dtype=torch.uint8)
    pixels[size // 4 : size // 2] = 255
    return Image.fromarray(pixels.numpy())


def call(**more: object) -> dict:
    """What every call has. A generator is used up by a call: take a fresh case for each run that shall repeat."""
    return dict(num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)) | more


def flux_call(**more: object) -> dict:
    embeds = dict(prompt_embeds=normal(1, TEXT, TEXT_DIM), pooled_prompt_embeds=normal(1, POOLED))
    return call(**embeds, height=SIZE, width=SIZE, guidance_scale=3.5) | more


def flux_pipeline(name: str = "FluxPipeline", transformer: nn.Module | None = None, **parts: object):
    import diffusers

    components = dict(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flux_vae(),
        transformer=transformer if transformer is not None else flux()[0],
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe = getattr(diffusers, name)(**(components | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_text_to_image() -> PipelineCase:
    return flux_pipeline(), flux_call()


def flux_prompt() -> PipelineCase:
    """With text encoders and tokenizers: the prompt is a string."""
    text = dict(
        text_encoder=tiny_text.clip_model(),
        tokenizer=tiny_text.clip_tokenizer(),
        text_encoder_2=tiny_text.t5_model(),
        tokenizer_2=tiny_text.t5_tokenizer(),
    )
    arguments = call(prompt="a red cube", height=SIZE, width=SIZE, max_sequence_length=TEXT)
    return flux_pipeline(**text), arguments


def flux_img2img() -> PipelineCase:
    return flux_pipeline("FluxImg2ImgPipeline"), flux_call(image=image(), strength=0.9)


def flux_inpaint() -> PipelineCase:
    return flux_pipeline("FluxInpaintPipeline"), flux_call(image=image(), mask_image=mask(), strength=0.9)


def flux_fill() -> PipelineCase:
    from diffusers import FluxTransformer2DModel

    channels = 64 + 64 + 4  # latent, masked latent, and a mask of one value per pixel (this VAE keeps the size)
    transformer = randomise(FluxTransformer2DModel(**flux_config(in_channels=channels, out_channels=64)))
    return flux_pipeline("FluxFillPipeline", transformer), flux_call(image=image(), mask_image=mask())


def flux_kontext() -> PipelineCase:
    arguments = flux_call(image=image(), max_area=SIZE * SIZE, _auto_resize=False)
    return flux_pipeline("FluxKontextPipeline"), arguments


def flux_with_controlnet() -> PipelineCase:
    pipe = flux_pipeline("FluxControlNetPipeline", controlnet=flux_controlnet()[0])
    return pipe, flux_call(control_image=image(), controlnet_conditioning_scale=0.7)


def flux_ip_adapter() -> PipelineCase:
    """The adapter's own weights, without its vision encoder: the call gives image embeddings."""
    pipe = flux_pipeline()
    pipe.transformer._load_ip_adapter_weights(ip_adapter_weights(pipe.transformer), low_cpu_mem_usage=False)
    cast(pipe.transformer, DTYPE)
    embeds = dict(
        ip_adapter_image_embeds=[normal(1, 1, 32)], negative_ip_adapter_image_embeds=[normal(1, 1, 32, seed=9)]
    )
    return pipe, flux_call(**embeds)


def ip_adapter_weights(transformer: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict of the published form, for image embeddings of 32 values and 4 tokens per image."""
    inner, tokens = transformer.inner_dim, 4 * TEXT_DIM
    projection = {"proj.weight": normal(tokens, 32), "proj.bias": normal(tokens)}
    projection |= {"norm.weight": torch.ones(TEXT_DIM, dtype=DTYPE), "norm.bias": torch.zeros(TEXT_DIM, dtype=DTYPE)}
    layers = {}
    for i in range(len(transformer.transformer_blocks)):
        for which, seed in (("to_k_ip", 20), ("to_v_ip", 40)):
            layers[f"{i}.{which}.weight"] = 0.1 * normal(inner, TEXT_DIM, seed=seed + i)
            layers[f"{i}.{which}.bias"] = 0.1 * normal(inner, seed=seed + i)
    return {"image_proj": projection, "ip_adapter": layers}


def sdxl_call(**more: object) -> dict:
    embeds = dict(prompt_embeds=normal(1, TEXT, TEXT_DIM), pooled_prompt_embeds=normal(1, POOLED))
    negative = {f"negative_{name}": -tensor for name, tensor in embeds.items()}
    return call(**embeds, **negative, guidance_scale=5.0) | more


def sdxl_pipeline(name: str = "StableDiffusionXLPipeline", **parts: object):
    import diffusers

    components = dict(
        scheduler=diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        vae=sdxl_vae(),
        unet=sdxl()[0],
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=tiny_text.clip_model(projection=True, width=TEXT_DIM // 2),
        tokenizer_2=None,
    )
    pipe = getattr(diffusers, name)(**(components | parts), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_text_to_image() -> PipelineCase:
    return sdxl_pipeline(), sdxl_call(height=2 * SIZE, width=2 * SIZE)


def sdxl_img2img() -> PipelineCase:
    return sdxl_pipeline("StableDiffusionXLImg2ImgPipeline"), sdxl_call(image=image(2 * SIZE), strength=0.9)


def sdxl_inpaint() -> PipelineCase:
    arguments = sdxl_call(image=image(2 * SIZE), mask_image=mask(2 * SIZE), strength=0.9)
    return sdxl_pipeline("StableDiffusionXLInpaintPipeline"), arguments | dict(height=2 * SIZE, width=2 * SIZE)


def sdxl_with_controlnet() -> PipelineCase:
    pipe = sdxl_pipeline("StableDiffusionXLControlNetPipeline", controlnet=sdxl_controlnet()[0])
    return pipe, sdxl_call(image=image(2 * SIZE), controlnet_conditioning_scale=0.7)


PIPELINES: dict[str, Callable[[], PipelineCase]] = {
    "flux": flux_text_to_image,
    "flux_prompt": flux_prompt,
    "flux_img2img": flux_img2img,
    "flux_inpaint": flux_inpaint,
    "flux_fill": flux_fill,
    "flux_kontext": flux_kontext,
    "flux_controlnet": flux_with_controlnet,
    "flux_ip_adapter": flux_ip_adapter,
    "sdxl": sdxl_text_to_image,
    "sdxl_img2img": sdxl_img2img,
    "sdxl_inpaint": sdxl_inpaint,
    "sdxl_controlnet": sdxl_with_controlnet,
}
