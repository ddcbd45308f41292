"""Which linears Nunchaku's files hold for each architecture, what they are called there and which of diffusers' modules
each is made of: written down from the format's description, for tests to compare the package's own tables with."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SHORT = {"smooth": "smooth", "smooth_orig": "smooth_orig", "down": "lora_down", "up": "lora_up"}
LONG = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "down": "proj_down", "up": "proj_up"}
CLASSES = {
    "flux": "NunchakuFluxTransformer2dModel", "qwen_image": "NunchakuQwenImageTransformer2DModel",
    "z_image": "NunchakuZImageTransformer2DModel", "sdxl": "NunchakuSDXLUNet2DConditionModel",
    "sana": "NunchakuSanaTransformer2DModel", "t5": "NunchakuT5EncoderModel",
}
SUFFIXES = {"flux": SHORT, "qwen_image": LONG, "z_image": LONG, "sdxl": SHORT, "sana": SHORT, "t5": SHORT}
# SDXL's and Z-Image's readers have no place for the bias of a linear without one; the others' ask for zeros.
WITHOUT_ZERO_BIASES = ("sdxl", "z_image")
WITHOUT_WTSCALE = ("sdxl",)  # nor one for it


@dataclass(frozen=True)
class Packed:
    """A linear of a file. columns: of a FLUX single block's proj_out, the attention's or the MLP's."""

    name: str
    modules: tuple[str, ...]
    kind: str = "w4a4"  # "awq", "t5"
    order: str = "one after the other"  # "pairs", "heads"
    after_gelu: bool = False
    kinds: int = 0  # of a modulation: 6 or 3
    columns: str = ""


def _linears(*rows: tuple[str, str]) -> list[Packed]:
    return [Packed(name, tuple(modules.split())) for name, modules in rows]


def flux_block(prefix: str) -> list[Packed]:
    return _under(prefix, [
        Packed("norm1.linear", ("norm1.linear",), "awq", kinds=6),
        Packed("norm1_context.linear", ("norm1_context.linear",), "awq", kinds=6),
        *_linears(("qkv_proj", "attn.to_q attn.to_k attn.to_v"),
                  ("qkv_proj_context", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
                  ("out_proj", "attn.to_out.0"), ("out_proj_context", "attn.to_add_out"),
                  ("mlp_fc1", "ff.net.0.proj"), ("mlp_context_fc1", "ff_context.net.0.proj")),
        Packed("mlp_fc2", ("ff.net.2",), after_gelu=True),
        Packed("mlp_context_fc2", ("ff_context.net.2",), after_gelu=True)])


def flux_single_block(prefix: str) -> list[Packed]:
    return _under(prefix, [
        Packed("norm.linear", ("norm.linear",), "awq", kinds=3),
        *_linears(("qkv_proj", "attn.to_q attn.to_k attn.to_v"), ("mlp_fc1", "proj_mlp")),
        Packed("out_proj", ("proj_out",), columns="attention"),
        Packed("mlp_fc2", ("proj_out",), after_gelu=True, columns="mlp")])


def qwen_block(prefix: str) -> list[Packed]:
    return _under(prefix, [
        Packed("img_mod.1", ("img_mod.1",), "awq", kinds=6),
        Packed("txt_mod.1", ("txt_mod.1",), "awq", kinds=6),
        *_linears(("attn.to_qkv", "attn.to_q attn.to_k attn.to_v"),
                  ("attn.add_qkv_proj", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
                  ("attn.to_out.0", "attn.to_out.0"), ("attn.to_add_out", "attn.to_add_out"),
                  ("img_mlp.net.0.proj", "img_mlp.net.0.proj"), ("txt_mlp.net.0.proj", "txt_mlp.net.0.proj")),
        Packed("img_mlp.net.2", ("img_mlp.net.2",), after_gelu=True),
        Packed("txt_mlp.net.2", ("txt_mlp.net.2",), after_gelu=True)])


def z_image_block(prefix: str) -> list[Packed]:
    return _under(prefix, _linears(
        ("attention.to_qkv", "attention.to_q attention.to_k attention.to_v"),
        ("attention.to_out.0", "attention.to_out.0"),
        ("feed_forward.net.0.proj", "feed_forward.w3 feed_forward.w1"), ("feed_forward.net.2", "feed_forward.w2")))


def sdxl_block(prefix: str) -> list[Packed]:
    return _under(prefix, _linears(
        ("attn1.to_qkv", "attn1.to_q attn1.to_k attn1.to_v"), ("attn1.to_out.0", "attn1.to_out.0"),
        ("attn2.to_q", "attn2.to_q"), ("attn2.to_out.0", "attn2.to_out.0"),
        ("ff.net.0.proj", "ff.net.0.proj"), ("ff.net.2", "ff.net.2")))


def sana_block(prefix: str) -> list[Packed]:
    return _under(prefix, [
        Packed("attn.qkv_proj", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), order="heads"),
        *_linears(("attn.out_proj", "attn1.to_out.0"), ("cross_attn.q_linear", "attn2.to_q"),
                  ("cross_attn.out_proj", "attn2.to_out.0"), ("ff.point_conv", "ff.conv_point")),
        Packed("ff.inverted_conv", ("ff.conv_inverted",), order="pairs")])


def t5_block(prefix: str) -> list[Packed]:
    names = [f"layer.0.SelfAttention.{leaf}" for leaf in "qkvo"]
    names += [f"layer.1.DenseReluDense.{leaf}" for leaf in ("wi_0", "wi_1", "wo")]
    return _under(prefix, [Packed(name, (name,), "t5") for name in names])


def _under(prefix: str, linears: list[Packed]) -> list[Packed]:
    return [Packed(f"{prefix}.{item.name}", tuple(f"{prefix}.{module}" for module in item.modules), item.kind,
                   item.order, item.after_gelu, item.kinds, item.columns) for item in linears]


def packed_linears(family: str, dense_refiners: bool = False) -> Iterator[Packed]:
    """Of the tiny models of files.py, which have one block of each kind."""
    if family == "flux":
        yield from flux_block("transformer_blocks.0")
        yield from flux_single_block("single_transformer_blocks.0")
    elif family == "qwen_image":
        yield from qwen_block("transformer_blocks.0")
    elif family == "z_image":
        for prefix in ("layers.0",) if dense_refiners else ("layers.0", "noise_refiner.0", "context_refiner.0"):
            yield from z_image_block(prefix)
    elif family == "sdxl":
        for prefix in ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0",
                       "up_blocks.0.attentions.1"):
            yield from sdxl_block(f"{prefix}.transformer_blocks.0")
    elif family == "sana":
        yield from sana_block("transformer_blocks.0")
    else:
        yield from t5_block("encoder.block.0")


_FLUX_NORMS = {f"attn.{name}.weight": f"{name}.weight" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
RENAMED = {  # diffusers' name → the file's, of what stays in 16 bit
    "flux": [("transformer_blocks.0", _FLUX_NORMS), ("single_transformer_blocks.0", _FLUX_NORMS)],
    "sana": [("transformer_blocks.0", {"ff.conv_depth.weight": "ff.depth_conv.weight",
                                       "ff.conv_depth.bias": "ff.depth_conv.bias"})],
}
