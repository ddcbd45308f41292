"""A whole FLUX pipeline in miniature: real diffusers and transformers classes, random weights, no download.

Its weights are drawn so that quantization has something to do, as in trained models: heavy tails, and a few input
channels that are tens of times larger than the others (they come from the modulation, as they do in FLUX).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tokens import SPECIAL, VOCABULARY, byte_tokenizer

LATENT_CHANNELS = 16
OUTLIERS, OUTLIER_SIZE = 0.01, 24.0  # this part of the channels is this many times larger
TAIL = 4.0  # degrees of freedom of the weights' Student t


@dataclass(frozen=True)
class Size:
    """The extents of a miniature; rotary axes need heads of 64."""

    heads: int = 6
    double: int = 1
    single: int = 1
    text: int = 128
    pooled: int = 64
    vae: int = 32

    @property
    def hidden(self) -> int:
        return 64 * self.heads


DEMO = Size()
TINY = Size(heads=2, text=64, pooled=32, vae=16)


def flux_pipeline(size: Size = DEMO, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A FluxPipeline that takes prompts and gives images (of noise)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_vae(size), text_encoder=_clip(size), tokenizer=byte_tokenizer(77),
            text_encoder_2=_t5(size), tokenizer_2=byte_tokenizer(512), transformer=flux_transformer(size, seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def flux_transformer(size: Size = DEMO, seed: int = 0) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=size.double, num_single_layers=size.single,
        attention_head_dim=64, num_attention_heads=size.heads, joint_attention_dim=size.text,
        pooled_projection_dim=size.pooled, guidance_embeds=True, axes_dims_rope=(16, 24, 24))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_value(name, parameter, generator))
        for name, module in model.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", ".norm.linear")):
                _enlarge_channels(module.bias, size.hidden, generator)
    return model.eval()


def _value(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim == 1:
        return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
    tails = torch.randn(4, *like.shape, generator=generator).square().mean(0).rsqrt()  # Student t with TAIL = 4
    return noise * tails * (like.shape[1] * TAIL / (TAIL - 2)) ** -0.5


def _enlarge_channels(bias: Tensor, hidden: int, generator: torch.Generator) -> None:
    """Modulation is cat(shift, scale, gate, …): the scale's bias makes channels of the modulated input large."""
    count = max(1, round(OUTLIERS * hidden))
    for scale in range(1, len(bias) // hidden, 3):
        chosen = torch.randperm(hidden, generator=generator)[:count]
        bias[scale * hidden + chosen] = OUTLIER_SIZE * (0.5 + torch.rand(count, generator=generator))


def _vae(size: Size) -> nn.Module:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(size.vae,) * 4, layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=8,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 2  # more contrast: a fresh decoder paints everything grey
    return vae.eval()


def _clip(size: Size) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=size.pooled, intermediate_size=2 * size.pooled, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=SPECIAL.index("<pad>"), bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"))).eval()


def _t5(size: Size) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=VOCABULARY, d_model=size.text, d_kv=32, d_ff=2 * size.text, num_layers=2, num_heads=2)).eval()
