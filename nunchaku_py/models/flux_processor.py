"""FLUX attention that quantizes the image tokens and the text tokens once for q, k and v."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from ..together import AttentionView

IMAGE = ("to_q", "to_k", "to_v")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")


class SharedInputProcessor(FluxAttnProcessor):
    """diffusers' processor, with the projections computed together; it steps aside for fused projections."""

    @wraps(FluxAttnProcessor.__call__)  # diffusers passes on the arguments that the signature names
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not attn.fused_projections:
            text = encoder_hidden_states is not None and attn.added_kv_proj_dim is not None
            inputs = [(hidden_states, IMAGE)] + ([(encoder_hidden_states, TEXT)] if text else [])
            attn = AttentionView(attn, inputs)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
