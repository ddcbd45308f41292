"""Foreign module names as data: what the authors of a model, and trainers that keep their names, call its modules.

A row says that the rows of the weight `foreign` are those of diffusers' `modules`, one after the other; their sizes
come from the model at hand. `{}` is a block's number. `shift_first`: where the module holds scale and shift of a last
normalization (twice as many rows as columns), the foreign weight has the shift first.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    foreign: str
    modules: tuple[str, ...]
    shift_first: bool = False


@dataclass(frozen=True)
class Family:
    """The table of the model classes whose names match `classes`."""

    names: str
    classes: str
    rows: tuple[Row, ...]


def _rows(foreign: str, own: str, pairs: dict[str, str]) -> tuple[Row, ...]:
    """One row per pair, with prefixes; a right side with spaces names several modules."""
    return tuple(Row(foreign + left, tuple(own + name for name in right.split())) for left, right in pairs.items())


def _shift_first(foreign: str, own: str) -> Row:
    return Row(foreign, (own,), shift_first=True)


_DOUBLE_BLOCK = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX = (
    *_rows("double_blocks.{}.", "transformer_blocks.{}.", _DOUBLE_BLOCK | {
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        # XLabs, whose keys `…processor.qkv_lora1.down.weight` are parsed to these
        "processor.qkv1": "attn.to_q attn.to_k attn.to_v",
        "processor.qkv2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "processor.proj1": "attn.to_out.0",
        "processor.proj2": "attn.to_add_out",
    }),
    *_rows("single_blocks.{}.", "single_transformer_blocks.{}.", {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
        "processor.qkv": "attn.to_q attn.to_k attn.to_v",
        "processor.proj": "proj_out",
    }),
    *_rows("", "", {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
        "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
    }),
    *_rows("", "time_text_embed.", {
        "time_in.in_layer": "timestep_embedder.linear_1",
        "time_in.out_layer": "timestep_embedder.linear_2",
        "guidance_in.in_layer": "guidance_embedder.linear_1",
        "guidance_in.out_layer": "guidance_embedder.linear_2",
        "vector_in.in_layer": "text_embedder.linear_1",
        "vector_in.out_layer": "text_embedder.linear_2",
    }),
    _shift_first("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
_FLUX_2 = (
    *_rows("double_blocks.{}.", "transformer_blocks.{}.", _DOUBLE_BLOCK | {
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }),
    *_rows("single_blocks.{}.", "single_transformer_blocks.{}.", {
        "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "attn.to_out",
    }),
    *_rows("sformer_blocks.{}.", "transformer_blocks.{}.", {  # some savers cut what they take for a container
        name: name for name in (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
            "attn.add_v_proj", "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
            "ff_context.linear_out")
    }),
    *_rows("", "", {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "final_layer.linear": "proj_out",
    }),
    _shift_first("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
_SD3 = (
    *_rows("joint_blocks.{}.", "transformer_blocks.{}.", {
        "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
        "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.proj": "attn2.to_out.0",
        "context_block.attn.proj": "attn.to_add_out",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
    }),
    _shift_first("joint_blocks.{}.context_block.adaLN_modulation.1", "transformer_blocks.{}.norm1_context.linear"),
    _shift_first("final_layer.adaLN_modulation.1", "norm_out.linear"),
    *_rows("", "", {"final_layer.linear": "proj_out", "x_embedder.proj": "pos_embed.proj"}),
    *_rows("", "time_text_embed.", {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.mlp.0": "text_embedder.linear_1",
        "y_embedder.mlp.2": "text_embedder.linear_2",
    }),
)
_Z_IMAGE = (
    *(row for blocks in ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.")
      for row in _rows(blocks + "attention.", blocks + "attention.", {"qkv": "to_q to_k to_v", "out": "to_out.0"})),
    *_rows("", "", {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }),
)
_LUMINA_2 = (
    *(row for blocks in ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.") for row in _rows(blocks, blocks, {
        "attention.qkv": "attn.to_q attn.to_k attn.to_v",
        "attention.out": "attn.to_out.0",
        "feed_forward.w1": "feed_forward.linear_1",
        "feed_forward.w2": "feed_forward.linear_2",
        "feed_forward.w3": "feed_forward.linear_3",
        "adaLN_modulation.1": "norm1.linear",
    })),
)
_WAN = (
    *(row for blocks in ("blocks.{}.", "vace_blocks.{}.") for row in _rows(blocks, blocks, {
        "self_attn.q": "attn1.to_q",
        "self_attn.k": "attn1.to_k",
        "self_attn.v": "attn1.to_v",
        "self_attn.o": "attn1.to_out.0",
        "cross_attn.q": "attn2.to_q",
        "cross_attn.k": "attn2.to_k",
        "cross_attn.v": "attn2.to_v",
        "cross_attn.o": "attn2.to_out.0",
        "cross_attn.k_img": "attn2.add_k_proj",
        "cross_attn.v_img": "attn2.add_v_proj",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "before_proj": "proj_in",
        "after_proj": "proj_out",
    })),
    *_rows("", "condition_embedder.", {
        "time_embedding.0": "time_embedder.linear_1",
        "time_embedding.2": "time_embedder.linear_2",
        "text_embedding.0": "text_embedder.linear_1",
        "text_embedding.2": "text_embedder.linear_2",
        "time_projection.1": "time_proj",
        "img_emb.proj.1": "image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "image_embedder.ff.net.2",
    }),
    *_rows("", "", {"head.head": "proj_out"}),
)
_LTX = (
    *_rows("", "", {"patchify_proj": "proj_in"}),
    *_rows("adaln_single.", "time_embed.", {
        "linear": "linear",
        "emb.timestep_embedder.linear_1": "emb.timestep_embedder.linear_1",
        "emb.timestep_embedder.linear_2": "emb.timestep_embedder.linear_2",
    }),
)

FAMILIES = (
    Family("BFL names", r"Flux(?![23])|Chroma", _FLUX),
    Family("BFL names", r"Flux2", _FLUX_2),
    Family("original names", r"SD3", _SD3),
    Family("original names", r"ZImage", _Z_IMAGE),
    Family("original names", r"Lumina2", _LUMINA_2),
    Family("original names", r"Wan", _WAN),
    Family("original names", r"LTX", _LTX),
)
