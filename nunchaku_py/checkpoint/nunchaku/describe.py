"""The metadata of a file of Nunchaku's: what its readers ask for, and what we say to ourselves."""
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import nn

from ..headers import METADATA
from ..manifest import manifest_of
from .families import FLUX, T5, Z_IMAGE

if TYPE_CHECKING:
    from .write import Writer

OWN = "nunchaku_py"  # the entry in which we say what the file cannot: ranks without padding
_NO_CONFIG = ("quantization_config", "_name_or_path")


def metadata_of(writer: Writer) -> dict[str, str]:
    """What the file was read with, where it was read from one, with what is true of it now."""
    model, config = writer.model, config_of(writer.model)
    found = dict(_kept(model))
    found |= {"format": "pt", "config": json.dumps(config, sort_keys=True), "model_class": writer.family.peer,
              OWN: _own(writer)}
    quantization = quantization_config(writer)
    if _parsed(found.get("quantization_config")) != quantization:
        found["quantization_config"] = json.dumps(quantization)
    if writer.family is FLUX and "comfy_config" not in found:
        found["comfy_config"] = json.dumps(comfy_config(config))
    return found


def _own(writer: Writer) -> str:
    """Exact biases only as far as readers take metadata of their size."""
    found: dict[str, Any] = {"sites": manifest_of(writer.model).to_json()["sites"]}
    biases = writer.exact_biases()
    if sum(map(len, biases.values())) < METADATA // 2:
        found["biases"] = biases
    return json.dumps(found, sort_keys=True)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's configuration, of JSON values, without what we added."""
    text = model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string()
    return {key: value for key, value in json.loads(text).items() if key not in _NO_CONFIG}


def _kept(model: nn.Module) -> dict[str, str]:
    """The metadata of the file that the model was read from."""
    config = getattr(model.config, "quantization_config", None)
    report = getattr(config, "report", None) or (config.get("report") if isinstance(config, dict) else None) or {}
    source = report.get("source") if isinstance(report, dict) else None
    kept = source.get("metadata") if isinstance(source, dict) and source.get("format") == "nunchaku" else None
    return {key: value for key, value in kept.items() if isinstance(value, str)} if isinstance(kept, dict) else {}


def _parsed(text: str | None) -> Any:
    """None of what is not JSON."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def quantization_config(writer: Writer) -> dict[str, Any]:
    floats = writer.format == "nvfp4"
    dtype, group = ("fp4_e2m1_all", 16) if floats else ("int4", 64)
    numbers = {"dtype": dtype, "group_size": group}
    found = {"method": "svdquant",
             "weight": {**numbers, "scale_dtype": [None, "fp8_e4m3_nan"] if floats else None},
             "activation": {**numbers, "scale_dtype": "fp8_e4m3_nan" if floats else None}, "rank": writer.rank}
    if writer.family is T5:
        return {"method": "awq", "weight": {"dtype": "int4", "scale_dtype": None, "group_size": 128}}
    if writer.family is Z_IMAGE:
        found["skip_refiners"] = not any("_refiner." in item.name for item in writer.items)
    return found


def comfy_config(config: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI's loader of FLUX asks for, out of diffusers' configuration."""
    guided = bool(config.get("guidance_embeds"))
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    channels = config["in_channels"] // 4
    return {"model_class": "Flux" if guided else "FluxSchnell", "model_config": {
        "image_model": "flux", "axes_dim": list(config["axes_dims_rope"]), "in_channels": channels,
        "out_channels": (config.get("out_channels") or config["in_channels"]) // 4, "hidden_size": heads * size,
        "num_heads": heads, "depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"],
        "context_in_dim": config["joint_attention_dim"], "vec_in_dim": config["pooled_projection_dim"],
        "guidance_embed": guided, "mlp_ratio": 4.0, "patch_size": 2, "qkv_bias": True, "theta": 10000,
        "disable_unet_model_creation": True}}


