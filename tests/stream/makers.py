"""The names that models have where they were made, from diffusers' names: each function takes a state dict apart by
hand, and is the inverse of what diffusers' converter does. Names are spelled out here, not taken from diffusers."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nunchaku_py.checkpoint.tensor_file import _header_text, layout_of

State = dict[str, Tensor]
PREFIX = "model.diffusion_model."


def sparse(path: Path, state: Mapping[str, Tensor]) -> None:
    """A safetensors file in which tensors on the meta device are holes."""
    layout = layout_of(state)
    text, places = _header_text(path, layout, {})
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        for name, tensor in state.items():
            if not tensor.is_meta:
                file.seek(start + places[name])
                file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        file.truncate(start + max(places[name] + tensor.nbytes for name, tensor in state.items()))


def prefixed(state: Mapping[str, Tensor], prefix: str = PREFIX) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _joined(state: Mapping[str, Tensor], made: State, foreign: str, modules: list[str]) -> None:
    """One foreign linear of several."""
    for leaf in ("weight", "bias"):
        if f"{modules[0]}.{leaf}" in state:
            made[f"{foreign}.{leaf}"] = torch.cat([state[f"{module}.{leaf}"] for module in modules])


def _count(state: Mapping[str, Tensor], block: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{block}."))


def flux(state: Mapping[str, Tensor]) -> State:
    made: State = {}
    ends = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for own, foreign in {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}.items():
        for n, half in {1: "in_layer", 2: "out_layer"}.items():
            ends[f"{foreign}.{half}"] = f"time_text_embed.{own}_embedder.linear_{n}"
    for foreign, own in ends.items():
        _joined(state, made, foreign, [own])
    for leaf in ("weight", "bias"):
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = _swapped(state[f"norm_out.linear.{leaf}"])
    for i in range(_count(state, "transformer_blocks")):
        own, foreign = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, added, qkv, out in (("img", "", "to_{}", "to_out.0"),
                                        ("txt", "_context", "add_{}_proj", "to_add_out")):
            _joined(state, made, f"{foreign}.{stream}_attn.qkv", [f"{own}.attn.{qkv.format(n)}" for n in "qkv"])
            _joined(state, made, f"{foreign}.{stream}_attn.proj", [f"{own}.attn.{out}"])
            _joined(state, made, f"{foreign}.{stream}_mod.lin", [f"{own}.norm1{added}.linear"])
            _joined(state, made, f"{foreign}.{stream}_mlp.0", [f"{own}.ff{added}.net.0.proj"])
            _joined(state, made, f"{foreign}.{stream}_mlp.2", [f"{own}.ff{added}.net.2"])
            for half, name in {"query": "q", "key": "k"}.items():
                norm = f"norm_{name}" if stream == "img" else f"norm_added_{name}"
                made[f"{foreign}.{stream}_attn.norm.{half}_norm.scale"] = state[f"{own}.attn.{norm}.weight"]
    for i in range(_count(state, "single_transformer_blocks")):
        own, foreign = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        _joined(state, made, f"{foreign}.linear1", [*(f"{own}.attn.to_{n}" for n in "qkv"), f"{own}.proj_mlp"])
        _joined(state, made, f"{foreign}.linear2", [f"{own}.proj_out"])
        _joined(state, made, f"{foreign}.modulation.lin", [f"{own}.norm.linear"])
        for half, name in {"query": "q", "key": "k"}.items():
            made[f"{foreign}.norm.{half}_norm.scale"] = state[f"{own}.attn.norm_{name}.weight"]
    return made


_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def unet(state: Mapping[str, Tensor], layers: int) -> State:
    """layers: resnets of a down block."""
    with_attention = {match[1] for name in state if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    return {_unet_name(name, layers, with_attention): tensor for name, tensor in state.items()}


def _unet_name(name: str, layers: int, with_attention: set[str]) -> str:
    for own, foreign in _UNET_ENDS.items():
        if name.startswith(f"{own}."):
            return foreign + name.removeprefix(own)
    where, block, part, n, rest = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name).groups()
    if part == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{2 if block in with_attention else 1}.{rest}"
    if part == "resnets":
        inner, _, leaf = rest.rpartition(".")
        rest = f"{_RESNET[inner]}.{leaf}"
    if where == "mid":
        return f"middle_block.{2 * int(n) if part == 'resnets' else 1}.{rest}"
    place = int(block) * (layers + 1) + int(n) + (1 if where == "down" else 0)
    return f"{'input' if where == 'down' else 'output'}_blocks.{place}.{int(part == 'attentions')}.{rest}"


def sd3(state: Mapping[str, Tensor]) -> State:
    made: State = {"pos_embed": state["pos_embed.pos_embed"]}
    ends = {"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
            "final_layer.linear": "proj_out"}
    for own, foreign in {"timestep": "t_embedder", "text": "y_embedder"}.items():
        for n in (1, 2):
            ends[f"{foreign}.mlp.{2 * n - 2}"] = f"time_text_embed.{own}_embedder.linear_{n}"
    for foreign, own in ends.items():
        _joined(state, made, foreign, [own])
    last = _count(state, "transformer_blocks") - 1
    for leaf in ("weight", "bias"):
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = _swapped(state[f"norm_out.linear.{leaf}"])
        made[f"joint_blocks.{last}.context_block.adaLN_modulation.1.{leaf}"] = _swapped(
            state[f"transformer_blocks.{last}.norm1_context.linear.{leaf}"])
    for i in range(last + 1):
        own, image, text = f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        pairs = {f"{image}.attn.proj": "attn.to_out.0", f"{text}.attn.proj": "attn.to_add_out",
                 f"{image}.attn2.proj": "attn2.to_out.0", f"{image}.adaLN_modulation.1": "norm1.linear",
                 f"{image}.mlp.fc1": "ff.net.0.proj", f"{image}.mlp.fc2": "ff.net.2",
                 f"{text}.mlp.fc1": "ff_context.net.0.proj", f"{text}.mlp.fc2": "ff_context.net.2",
                 f"{image}.attn.ln_q": "attn.norm_q", f"{image}.attn.ln_k": "attn.norm_k",
                 f"{text}.attn.ln_q": "attn.norm_added_q", f"{text}.attn.ln_k": "attn.norm_added_k",
                 f"{image}.attn2.ln_q": "attn2.norm_q", f"{image}.attn2.ln_k": "attn2.norm_k"}
        if i < last:
            pairs[f"{text}.adaLN_modulation.1"] = "norm1_context.linear"
        for foreign, name in pairs.items():
            _joined(state, made, foreign, [f"{own}.{name}"])
        _joined(state, made, f"{image}.attn.qkv", [f"{own}.attn.to_{n}" for n in "qkv"])
        _joined(state, made, f"{image}.attn2.qkv", [f"{own}.attn2.to_{n}" for n in "qkv"])
        _joined(state, made, f"{text}.attn.qkv", [f"{own}.attn.add_{n}_proj" for n in "qkv"])
    return made


def z_image(state: Mapping[str, Tensor]) -> State:
    made = {}
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
             ".attention.to_out.0.": ".attention.out.", ".attention.norm_k.": ".attention.k_norm.",
             ".attention.norm_q.": ".attention.q_norm."}
    for name, tensor in state.items():
        if name.endswith(".attention.to_q.weight"):
            module = name.removesuffix(".to_q.weight")
            _joined(state, made, f"{module}.qkv", [f"{module}.to_{n}" for n in "qkv"])
        elif not re.search(r"\.attention\.to_[kv]\.", name):
            for own, foreign in names.items():
                name = name.replace(own, foreign)
            made[name] = tensor
    return made


def wan(state: Mapping[str, Tensor]) -> State:
    names = {"norm2": "norm_", "norm3": "norm2", "norm_.": "norm3.", "attn1": "self_attn", "attn2": "cross_attn",
             ".to_out.0.": ".o.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".add_k_proj.": ".k_img.",
             ".add_v_proj.": ".v_img.", ".norm_added_k.": ".norm_k_img.", "ffn.net.0.proj": "ffn.0",
             "ffn.net.2": "ffn.2", "condition_embedder.time_embedder.linear_1": "time_embedding.0",
             "condition_embedder.time_embedder.linear_2": "time_embedding.2",
             "condition_embedder.text_embedder.linear_1": "text_embedding.0",
             "condition_embedder.text_embedder.linear_2": "text_embedding.2",
             "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
             "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
             "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
             "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
             "condition_embedder.image_embedder.norm2": "img_emb.proj.4"}
    made = {}
    for name, tensor in state.items():
        if name.startswith("condition_embedder.image_embedder"):
            pairs = [pair for pair in names.items() if pair[0].startswith("condition_embedder.image_embedder")]
        else:
            pairs = list(names.items())
        for own, foreign in pairs:
            name = name.replace(own, foreign)
        name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        made[name] = tensor
    return made
