"""Every model that `nunchaku-py bench` knows by name, with few and narrow blocks; everything else as it is."""
from __future__ import annotations

from typing import Any

from nunchaku_py.bench.known import KNOWN

NARROW: dict[str, dict[str, Any]] = {
    "flux.1-dev": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64,
                   "joint_attention_dim": 64, "pooled_projection_dim": 64, "in_channels": 16,
                   "axes_dims_rope": (16, 24, 24)},
    "qwen-image": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 64,
                   "axes_dims_rope": (16, 24, 24)},
    "sd3.5-large": {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 16},
    "sd3-medium": {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 16},
    "sdxl": {"block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "cross_attention_dim": 64,
             "transformer_layers_per_block": (1, 1, 2)},
    "pixart-sigma": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128,
                     "caption_channels": 64, "sample_size": 16},
    "sana-1.6b": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "num_cross_attention_heads": 2,
                  "cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 64},
    "z-image": {"n_layers": 2, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64},
}


def config_of(name: str) -> dict[str, Any]:
    return {"_class_name": KNOWN[name].cls, **KNOWN[name].config, **NARROW[name]}
