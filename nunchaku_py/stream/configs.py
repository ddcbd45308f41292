"""The config of a model that lies in one file: out of a folder that is given, or, for FLUX.1 and SDXL, found from the
shapes of its tensors. Nothing is fetched."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.headers import TensorHeader
from ..errors import NunchakuError
from ..folders import DENOISERS, read_json

Tensors = Mapping[str, TensorHeader]
Config = dict[str, Any]
# What the config of a FluxTransformer2DModel says → (BFL's name, diffusers' name, axis) of a tensor that shows it.
_FLUX: dict[str, tuple[str, str, int]] = {
    "in_channels": ("img_in.weight", "x_embedder.weight", 1),
    "out_channels": ("final_layer.linear.weight", "proj_out.weight", 0),
    "attention_head_dim": ("double_blocks.0.img_attn.norm.key_norm.scale",
                           "transformer_blocks.0.attn.norm_k.weight", 0),
    "joint_attention_dim": ("txt_in.weight", "context_embedder.weight", 1),
    "pooled_projection_dim": ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight", 1),
}
_FLUX_BLOCKS = {"num_layers": ("double_blocks", "transformer_blocks"),
                "num_single_layers": ("single_blocks", "single_transformer_blocks")}
_FLUX_GUIDANCE = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
_NO_FLUX = ("distilled_guidance_layer.", "single_stream_modulation.", "controlnet_")  # Chroma, FLUX.2, ControlNets
_AXES = [16, 56, 56]  # of FLUX.1's rotary embedding, which no tensor shows; they add up to its heads' channels
_SDXL_SIGNS = {  # (LDM's name, diffusers' name) → shape, of the two UNets of one size with the same text encoders
    ("label_emb.0.0.weight", "add_embedding.linear_1.weight"): (1280, 2816),
    ("input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
     "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"): (640, 2048),
}
_SDXL_INPUT = ("input_blocks.0.0.weight", "conv_in.weight")
_SDXL: Config = {
    "_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}


def config_of(folder: Path) -> Config:
    """The config in a model's folder, or of the denoiser in a pipeline's, without what it says of quantization."""
    names = [".", *DENOISERS] if not (folder / "model_index.json").is_file() else DENOISERS
    found = next((folder / name / "config.json" for name in names if (folder / name / "config.json").is_file()), None)
    if found is None:
        raise NunchakuError(f"{folder}: expected the folder of a model or pipeline, with the config.json of a model")
    return {key: value for key, value in read_json(found).items() if key != "quantization_config"}


def found_config(tensors: Tensors, label: str) -> Config:
    """From the tensors alone, in the names of their makers or diffusers'."""
    for find in _FINDERS:
        config = find(tensors)
        if config is not None:
            return config
    raise NunchakuError(f"{label}: its config does not show in its tensors ({_guess(tensors)}); name the folder of a "
                        "model or pipeline of its kind: --config MODEL_DIR")


def _flux(tensors: Tensors) -> Config | None:
    for style in (0, 1):
        shown_by = {key: (names[style], names[2]) for key, names in _FLUX.items()}
        if all(len(tensors[name].shape) > axis if name in tensors else False for name, axis in shown_by.values()):
            break
    else:
        return None
    if any(name.startswith(_NO_FLUX) for name in tensors):
        return None
    config: Config = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}
    config |= {key: tensors[name].shape[axis] for key, (name, axis) in shown_by.items()}
    config |= {key: _count(tensors, names[style]) for key, names in _FLUX_BLOCKS.items()}
    width = tensors[_FLUX["in_channels"][style]].shape[0]
    if config["attention_head_dim"] != sum(_AXES) or width % sum(_AXES):
        return None
    return config | {"num_attention_heads": width // sum(_AXES), "axes_dims_rope": _AXES,
                     "guidance_embeds": _FLUX_GUIDANCE[style] in tensors}


def _sdxl(tensors: Tensors) -> Config | None:
    for style in (0, 1):
        if all(names[style] in tensors and tensors[names[style]].shape == shape
               for names, shape in _SDXL_SIGNS.items()) and _SDXL_INPUT[style] in tensors:
            shape = tensors[_SDXL_INPUT[style]].shape
            return _SDXL | {"in_channels": shape[1], "out_channels": 4} if len(shape) == 4 else None
    return None


_FINDERS: tuple[Callable[[Tensors], Config | None], ...] = (_flux, _sdxl)


def _count(tensors: Tensors, block: str) -> int:
    """The numbers that blocks of this name have, up to the highest."""
    pattern = re.compile(rf"{block}\.(\d+)\.")
    return max((int(match[1]) + 1 for name in tensors if (match := pattern.match(name))), default=0)


def _guess(tensors: Tensors) -> str:
    """What diffusers takes it for, said to help only."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(dict(tensors))
    except Exception:  # whatever it trips over in tensors that it was not written for
        kind = "v1"
    return "they are none that are known" if kind == "v1" else f"it may be a {kind}"  # v1: diffusers' last resort
