"""What Nunchaku's files call the linears of each architecture, as data: which of diffusers' modules a packed linear
holds, how its rows stand, and what else has another name."""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Rows = Literal["joined", "paired", "heads"]


@dataclass(frozen=True)
class Stored:
    """One linear of a file. Names are below the block's."""

    name: str
    modules: tuple[str, ...]  # whose rows it holds
    gelu: bool = False  # its input comes from a GELU: INT4 is shifted
    part: int | None = None  # it is this K-part of the module
    spread: int = 0  # a modulation with so many outputs per channel, which stand together; 1 is added to its scales
    rows: Rows = "joined"  # one module after the other; value and gate in pairs; or q, then k and v by heads of 32
    dense: bool = False  # never quantized
    dense_too: bool = False  # its name in 16 bit, too
    divides: tuple[str, ...] = ()  # linears whose outputs are divided where its own smoothing is fused into them


@dataclass(frozen=True)
class Block:
    """Blocks whose names match `pattern`."""

    pattern: str
    linears: tuple[Stored, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)  # tensors: their name in a file → diffusers'
    interleaved: tuple[str, ...] = ()  # of these the rows are in pairs (value, gate)


@dataclass(frozen=True)
class Family:
    """An architecture."""

    model: str  # diffusers' or transformers' class
    peer: str  # Nunchaku's
    short_names: bool  # lora_down, smooth, …; else proj_down, smooth_factor, …
    blocks: tuple[Block, ...]
    may_be_dense: str = ""  # names of linears that may be in 16 bit, a regular expression
    every_bias: bool = False  # a bias of zeros where there is none; others load strictly what diffusers' class has
    by_channel: bool = False  # loads no wtscale, and misses a wcscales

    def blocks_of(self, model: nn.Module) -> Iterator[tuple[str, Block]]:
        for name, _ in model.named_modules():
            for block in self.blocks:
                if re.fullmatch(block.pattern, name):
                    yield name, block


_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_VALUES = ("attn.to_v", "attn.add_v_proj")
_NORMS = {f"{name}.weight": f"attn.{name}.weight" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}

FLUX = Family("FluxTransformer2DModel", "NunchakuFluxTransformer2dModel", True, (
    Block(r"transformer_blocks\.\d+", (
        Stored("norm1.linear", ("norm1.linear",), spread=6),
        Stored("norm1_context.linear", ("norm1_context.linear",), spread=6),
        Stored("qkv_proj", _QKV),
        Stored("qkv_proj_context", _ADDED),
        Stored("out_proj", ("attn.to_out.0",), divides=_VALUES),
        Stored("out_proj_context", ("attn.to_add_out",), divides=_VALUES),
        Stored("mlp_fc1", ("ff.net.0.proj",)),
        Stored("mlp_fc2", ("ff.net.2",), gelu=True),
        Stored("mlp_context_fc1", ("ff_context.net.0.proj",)),
        Stored("mlp_context_fc2", ("ff_context.net.2",), gelu=True),
    ), _NORMS),
    Block(r"single_transformer_blocks\.\d+", (
        Stored("norm.linear", ("norm.linear",), spread=3),
        Stored("qkv_proj", _QKV),
        Stored("mlp_fc1", ("proj_mlp",)),
        Stored("out_proj", ("proj_out",), part=0, divides=("attn.to_v",)),
        Stored("mlp_fc2", ("proj_out",), gelu=True, part=1),
    ), dict(list(_NORMS.items())[:2])),
), every_bias=True)

QWEN_IMAGE = Family("QwenImageTransformer2DModel", "NunchakuQwenImageTransformer2DModel", False, (
    Block(r"transformer_blocks\.\d+", (
        Stored("img_mod.1", ("img_mod.1",), spread=6),
        Stored("txt_mod.1", ("txt_mod.1",), spread=6),
        Stored("attn.to_qkv", _QKV),
        Stored("attn.add_qkv_proj", _ADDED),
        Stored("attn.to_out.0", ("attn.to_out.0",), divides=_VALUES),
        Stored("attn.to_add_out", ("attn.to_add_out",), divides=_VALUES),
        Stored("img_mlp.net.0.proj", ("img_mlp.net.0.proj",)),
        Stored("img_mlp.net.2", ("img_mlp.net.2",), gelu=True),
        Stored("txt_mlp.net.0.proj", ("txt_mlp.net.0.proj",)),
        Stored("txt_mlp.net.2", ("txt_mlp.net.2",), gelu=True),
    )),
))

Z_IMAGE = Family("ZImageTransformer2DModel", "NunchakuZImageTransformer2DModel", False, (
    Block(r"(layers|noise_refiner|context_refiner)\.\d+", (
        Stored("attention.to_qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
        Stored("attention.to_out.0", ("attention.to_out.0",), divides=("attention.to_v",)),
        Stored("feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1"), dense_too=True),  # value, gate
        Stored("feed_forward.net.2", ("feed_forward.w2",), dense_too=True),
    )),
), may_be_dense=r"(noise|context)_refiner\..*")

SDXL = Family("UNet2DConditionModel", "NunchakuSDXLUNet2DConditionModel", True, (
    Block(r"(.*\.)?attentions\.\d+\.transformer_blocks\.\d+", (
        Stored("attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        Stored("attn1.to_out.0", ("attn1.to_out.0",), divides=("attn1.to_v",)),
        Stored("attn2.to_q", ("attn2.to_q",)),
        Stored("attn2.to_out.0", ("attn2.to_out.0",)),
        Stored("ff.net.0.proj", ("ff.net.0.proj",)),
        Stored("ff.net.2", ("ff.net.2",)),
    )),
), by_channel=True)

SANA = Family("SanaTransformer2DModel", "NunchakuSanaTransformer2DModel", True, (
    Block(r"transformer_blocks\.\d+", (
        Stored("attn.qkv_proj", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), rows="heads"),
        Stored("attn.out_proj", ("attn1.to_out.0",), divides=("attn1.to_v",)),
        Stored("cross_attn.q_linear", ("attn2.to_q",)),
        Stored("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v"), dense=True),
        Stored("cross_attn.out_proj", ("attn2.to_out.0",)),
        Stored("ff.inverted_conv", ("ff.conv_inverted",), rows="paired"),
        Stored("ff.point_conv", ("ff.conv_point",)),
    ), {"ff.depth_conv.weight": "ff.conv_depth.weight", "ff.depth_conv.bias": "ff.conv_depth.bias"},
        interleaved=("ff.depth_conv.weight", "ff.depth_conv.bias")),
), every_bias=True)

T5 = Family("T5EncoderModel", "NunchakuT5EncoderModel", True, ())

FAMILIES = (FLUX, QWEN_IMAGE, Z_IMAGE, SDXL, SANA, T5)


def stored_so_in_16_bit(stored: Stored) -> bool:
    return stored.dense or stored.dense_too


def family_of(model: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if family.model == type(model).__name__), None)
