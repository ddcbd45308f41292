"""What a pipeline passes to its denoiser for one step of one image: random values of the real shapes."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NunchakuError

BF16 = torch.bfloat16
Inputs = dict[str, Any]


def inputs_of(model: nn.Module, width: int, height: int, text: int, batch: int, device: str = "cpu") -> Inputs:
    """Keyword arguments of `model` for an image of these pixels and a prompt of `text` tokens."""
    make = MAKERS.get(type(model).__name__)
    if make is None:
        raise NunchakuError(f"{type(model).__name__}: what a step of it is called with is not known; name a "
                            f"pipeline, or a model of {', '.join(MAKERS)}")
    torch.manual_seed(0)
    return on_device(make(model, width, height, text, batch), device)


def on_device(value: Any, device: str) -> Any:
    """Tensors inside tables and lists, too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on_device(inner, device) for name, inner in value.items()}
    if isinstance(value, list):
        return [on_device(inner, device) for inner in value]
    return value


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def flux(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    """Latents of 1/8 in patches of 2×2, numbered by row and column; the prompt stands at the origin."""
    config, columns = model.config, width // 16
    tokens = columns * (height // 16)
    ids = torch.zeros(tokens, 3, dtype=BF16)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // columns, torch.arange(tokens) % columns
    made = {"hidden_states": normal(batch, tokens, config.in_channels), "img_ids": ids,
            "encoder_hidden_states": normal(batch, text, config.joint_attention_dim),
            "txt_ids": torch.zeros(text, 3, dtype=BF16), "timestep": torch.full((batch,), 0.5, dtype=BF16),
            "pooled_projections": normal(batch, config.pooled_projection_dim)}
    return made | ({"guidance": torch.full((batch,), 3.5, dtype=BF16)} if config.guidance_embeds else {})


def sdxl(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    config = model.config
    made: Inputs = {"sample": normal(batch, config.in_channels, height // 8, width // 8),
                    "timestep": torch.tensor(500.0),
                    "encoder_hidden_states": normal(batch, text, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * batch).to(BF16)
        made["added_cond_kwargs"] = {"text_embeds": normal(batch, pooled), "time_ids": sizes}
    return made


def qwen(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    config, shape = model.config, (1, height // 16, width // 16)
    return {"hidden_states": normal(batch, shape[1] * shape[2], config.in_channels),
            "encoder_hidden_states": normal(batch, text, config.joint_attention_dim),
            "encoder_hidden_states_mask": torch.ones(batch, text, dtype=torch.int64),
            "timestep": torch.full((batch,), 0.5, dtype=BF16), "img_shapes": [[shape]] * batch}


def sd3(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    config = model.config
    return {"hidden_states": normal(batch, config.in_channels, height // 8, width // 8),
            "encoder_hidden_states": normal(batch, text, config.joint_attention_dim),
            "pooled_projections": normal(batch, config.pooled_projection_dim),
            "timestep": torch.full((batch,), 500.0)}


def pixart(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    return {"hidden_states": normal(batch, model.config.in_channels, height // 8, width // 8),
            "encoder_hidden_states": normal(batch, text, model.config.caption_channels),
            "encoder_attention_mask": torch.ones(batch, text, dtype=BF16), "timestep": torch.full((batch,), 500.0),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def sana(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    """Its autoencoder makes 32×32 pixels one token."""
    return {"hidden_states": normal(batch, model.config.in_channels, height // 32, width // 32),
            "encoder_hidden_states": normal(batch, text, model.config.caption_channels),
            "encoder_attention_mask": torch.ones(batch, text, dtype=BF16), "timestep": torch.full((batch,), 500.0)}


def z_image(model: nn.Module, width: int, height: int, text: int, batch: int) -> Inputs:
    """It takes lists, an item for each sample."""
    config = model.config
    return {"x": [normal(config.in_channels, 1, height // 8, width // 8) for _ in range(batch)],
            "t": torch.full((batch,), 0.5, dtype=BF16),
            "cap_feats": [normal(text, config.cap_feat_dim) for _ in range(batch)]}


MAKERS: dict[str, Callable[[nn.Module, int, int, int, int], Inputs]] = {
    "FluxTransformer2DModel": flux, "UNet2DConditionModel": sdxl, "QwenImageTransformer2DModel": qwen,
    "SD3Transformer2DModel": sd3, "PixArtTransformer2DModel": pixart, "SanaTransformer2DModel": sana,
    "ZImageTransformer2DModel": z_image}
