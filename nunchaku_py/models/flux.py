"""FLUX.1 and the models built like it: double-stream blocks, then single-stream blocks, the MLP beside attention."""

from __future__ import annotations

from torch import nn

from .discover import is_gelu
from .pattern import GENERIC, Parts


def split_proj_out(linear: nn.Module, block: nn.Module) -> Parts | None:
    """`proj_out` of a single-stream block reads cat(attention, GELU(proj_mlp x)): parts of different nature along K."""
    if not is_gelu(getattr(block, "act_mlp", None)):  # Ovis-Image: SiLU with a gate
        return None
    k, mlp = linear.in_features, block.proj_mlp.out_features
    return ((0, k - mlp, False), (k - mlp, k, True)) if k > mlp else None


def share_attention_inputs(model: nn.Module) -> None:
    """Attention with diffusers' plain processor quantizes its inputs once; any other processor (IP-Adapter) stays."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    from .flux_processor import SharedInputProcessor

    for module in model.modules():
        old = getattr(module, "processor", None)
        if type(old) is FluxAttnProcessor:
            new = SharedInputProcessor()
            new._attention_backend, new._parallel_config = old._attention_backend, old._parallel_config
            module.set_processor(new)


FLUX = GENERIC.extend(
    classes=(
        "FluxTransformer2DModel",
        "FluxControlNetModel",
        "ChromaTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanImageTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel",
        "MotifVideoTransformer3DModel",
        "OvisImageTransformer2DModel",
    ),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),),
    parts=(("proj_out", split_proj_out),),
    prepare=(share_attention_inputs,),
)
