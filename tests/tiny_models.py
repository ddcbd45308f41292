"""Tiny random models of many architectures, with inputs: bf16, seeded, every block matters to the output.

Hidden sizes are 64 to 128, so every linear has at least 32 inputs and 4-bit groups are whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
SIDE, TEXT = 8, 16  # image tokens are SIDE × SIDE
DIM, HEADS, HEAD_DIM, TEXT_DIM, POOLED = 128, 2, 64, 64, 64
AXES = [16, 24, 24]  # rotary axes of a 64-wide head
Case = tuple[nn.Module, dict]


def randomise(model: nn.Module, seed: int = 0, dtype: torch.dtype = DTYPE) -> nn.Module:
    """New values for every parameter, also those that diffusers starts at zero (gates, modulation, projections)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_value(name, noise))
    return cast(model, dtype).eval()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """To `dtype`, but for what loading keeps in fp32 (Wan's norms and tables)."""
    from diffusers import ModelMixin  # transformers keeps such modules in fp32 only beside fp16

    in_fp32 = tuple(model._keep_in_fp32_modules or ()) if isinstance(model, ModelMixin) else ()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and not any(part in name.split(".") for part in in_fp32):
            tensor.data = tensor.data.to(dtype)
    return model


def _value(name: str, noise: Tensor) -> Tensor:
    if name.endswith("scale_shift_table"):
        return 0.3 * noise
    if noise.ndim > 1:
        return noise * (noise.numel() / noise.shape[0]) ** -0.5
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def image_ids(batch_axes: int = 3) -> Tensor:
    """(SIDE², axes): the place of every image token, in the two axes after the first."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    ids = torch.zeros(SIDE * SIDE, batch_axes)
    ids[:, 1], ids[:, 2] = rows.flatten(), columns.flatten()
    return ids


def _flux_inputs(batch: int = 1, channels: int = 64) -> dict:
    return dict(
        hidden_states=normal(batch, SIDE * SIDE, channels),
        encoder_hidden_states=normal(batch, TEXT, TEXT_DIM),
        pooled_projections=normal(batch, POOLED),
        timestep=torch.full((batch,), 0.5, dtype=DTYPE),
        guidance=torch.full((batch,), 3.5),
        img_ids=image_ids(),
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )


def flux_config(**more: object) -> dict:
    config = dict(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=AXES,
    )
    return config | more


def flux(batch: int = 1) -> Case:
    from diffusers import FluxTransformer2DModel

    return randomise(FluxTransformer2DModel(**flux_config())), _flux_inputs(batch)


def flux_controlnet() -> Case:
    from diffusers import FluxControlNetModel

    model = FluxControlNetModel(**flux_config(num_layers=1, num_single_layers=1))
    return randomise(model, seed=5), _flux_inputs() | dict(controlnet_cond=normal(1, SIDE * SIDE, 64, seed=7))


def flux2() -> Case:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=32,
        axes_dims_rope=(16, 16, 16, 16),
    )
    inputs = _flux_inputs() | dict(img_ids=image_ids(4), txt_ids=torch.zeros(TEXT, 4))
    inputs.pop("pooled_projections")
    return randomise(model), inputs


def chroma() -> Case:
    from diffusers import ChromaTransformer2DModel

    config = flux_config(approximator_num_channels=16, approximator_hidden_dim=64, approximator_layers=1)
    for name in ("pooled_projection_dim", "guidance_embeds"):
        config.pop(name)
    inputs = _flux_inputs()
    for name in ("pooled_projections", "guidance"):
        inputs.pop(name)
    return randomise(ChromaTransformer2DModel(**config)), inputs


def sdxl_config(**more: object) -> dict:
    config = dict(
        in_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=TEXT_DIM,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    )
    return config | more


def sdxl_inputs() -> dict:
    return dict(
        sample=normal(1, 4, 16, 16),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        added_cond_kwargs=dict(text_embeds=normal(1, POOLED), time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]])),
        return_dict=False,
    )


def sdxl() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**sdxl_config(out_channels=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")))
    return randomise(model), sdxl_inputs()


def sdxl_controlnet() -> Case:
    from diffusers import ControlNetModel

    model = ControlNetModel(**sdxl_config(conditioning_embedding_out_channels=(16, 32)))
    return randomise(model, seed=5), sdxl_inputs() | dict(controlnet_cond=normal(1, 3, 32, 32))


def sd3() -> Case:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=DIM,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = dict(
        hidden_states=normal(1, 16, 16, 16),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        pooled_projections=normal(1, POOLED),
        timestep=torch.tensor([500.0]),
        return_dict=False,
    )
    return randomise(model), inputs


def pixart() -> Case:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        cross_attention_dim=DIM,
        sample_size=16,
        caption_channels=TEXT_DIM,
        use_additional_conditions=False,
    )
    inputs = dict(
        hidden_states=normal(1, 4, 16, 16),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        timestep=torch.tensor([500.0]),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
        return_dict=False,
    )
    return randomise(model), inputs


def sana() -> Case:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=64,
        cross_attention_dim=DIM,
        caption_channels=TEXT_DIM,
        sample_size=SIDE,
    )
    inputs = dict(
        hidden_states=normal(1, 16, SIDE, SIDE),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        timestep=torch.tensor([500.0]),
        return_dict=False,
    )
    return randomise(model), inputs


def qwen_image() -> Case:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=tuple(AXES),
    )
    inputs = dict(
        hidden_states=normal(1, SIDE * SIDE, 64),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        encoder_hidden_states_mask=torch.ones(1, TEXT, dtype=torch.bool),
        timestep=torch.tensor([0.5], dtype=DTYPE),
        img_shapes=[[(1, SIDE, SIDE)]],
        return_dict=False,
    )
    return randomise(model), inputs


def z_image() -> Case:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        dim=96,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[16, 16, 16],
        axes_lens=[64, 32, 32],
    )
    inputs = dict(
        x=[normal(16, 1, 16, 16)],
        t=torch.tensor([0.5], dtype=DTYPE),
        cap_feats=[normal(TEXT, TEXT_DIM)],
        return_dict=False,
    )
    return randomise(model), inputs


def wan() -> Case:
    """Image-to-video form: the text attention has further keys and values from an image."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=2,
        image_dim=64,
        added_kv_proj_dim=DIM,
        rope_max_seq_len=32,
    )
    inputs = dict(
        hidden_states=normal(1, 16, 2, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=normal(1, 512, TEXT_DIM),  # the model takes all but the last 512 rows for the image's
        encoder_hidden_states_image=normal(1, 8, 64),
        return_dict=False,
    )
    return randomise(model), inputs


def ltx() -> Case:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=64,
        out_channels=64,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=DIM,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )
    inputs = dict(
        hidden_states=normal(1, 2 * 4 * 8, 64),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        timestep=torch.tensor([500]),
        encoder_attention_mask=torch.ones(1, TEXT),
        num_frames=2,
        height=4,
        width=8,
        return_dict=False,
    )
    return randomise(model), inputs


def cogvideox() -> Case:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        time_embed_dim=64,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TEXT,
    )
    inputs = dict(
        hidden_states=normal(1, 2, 16, 8, 8),
        encoder_hidden_states=normal(1, TEXT, TEXT_DIM),
        timestep=torch.tensor([500]),
        return_dict=False,
    )
    return randomise(model), inputs


MODELS: dict[str, Callable[[], Case]] = {
    "flux": flux,
    "flux2": flux2,
    "chroma": chroma,
    "sdxl": sdxl,
    "sd3": sd3,
    "pixart": pixart,
    "sana": sana,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "wan": wan,
    "ltx": ltx,
    "cogvideox": cogvideox,
}
