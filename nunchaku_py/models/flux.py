"""FLUX.1 and the models built like it: double-stream blocks, then single-stream blocks, the MLP beside attention."""

from __future__ import annotations

from torch import nn

from .discover import is_gelu
from .flux_blocks import DOUBLE_BLOCKS, SINGLE_BLOCKS
from .pattern import GENERIC, Parts


def split_proj_out(linear: nn.Module, block: nn.Module) -> Parts | None:
    """`proj_out` of a single-stream block reads cat(attention, GELU(proj_mlp x)): parts of different nature along K."""
    if not is_gelu(getattr(block, "act_mlp", None)):  # Ovis-Image: SiLU with a gate
        return None
    k, mlp = linear.in_features, block.proj_mlp.out_features
    return ((0, k - mlp, False), (k - mlp, k, True)) if k > mlp else None


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
    fusions=(DOUBLE_BLOCKS, SINGLE_BLOCKS),
)
