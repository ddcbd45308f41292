"""The names that UNets of Stable Diffusion have in their authors' code, which trainers of SDXL keep: input_blocks,
middle_block, output_blocks. There every layer of a block has a number of its own, counted over all blocks."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LAYER = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_names(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(the authors' name, diffusers' name) of every module that has both."""
    layers = {name: found.groups() for name in modules if (found := _LAYER.match(name))}
    numbers = _numbers({(block, kind, int(place)) for block, kind, place, _ in layers.values()})
    for name, (block, kind, place, inner) in layers.items():
        yield f"{numbers[block, kind, int(place)]}.{_inner(kind, inner)}", name
    yield from ((_OUTSIDE[name], name) for name in modules if name in _OUTSIDE)


def _inner(kind: str, name: str) -> str:
    if kind == "resnets":
        return _RESNET.get(name, name)
    return "op" if kind == "downsamplers" else name


def _numbers(layers: set[tuple[str, str, int]]) -> dict[tuple[str, str, int], str]:
    """(block, kind, place) → where the authors have it, for instance input_blocks.4.1."""
    numbers = {
        ("mid_block", "resnets", 0): "middle_block.0",
        ("mid_block", "attentions", 0): "middle_block.1",
        ("mid_block", "resnets", 1): "middle_block.2",
    }
    number = 1  # input_blocks.0 is the first convolution
    for block, resnets in _blocks(layers, "down_blocks"):
        for place in range(resnets):
            numbers |= _layer(block, place, f"input_blocks.{number + place}")
        number += resnets
        if (block, "downsamplers", 0) in layers:
            numbers[block, "downsamplers", 0] = f"input_blocks.{number}.0"
            number += 1
    number = 0
    for block, resnets in _blocks(layers, "up_blocks"):
        for place in range(resnets):
            numbers |= _layer(block, place, f"output_blocks.{number + place}")
        number += resnets
        last = 2 if (block, "attentions", resnets - 1) in layers else 1
        numbers[block, "upsamplers", 0] = f"output_blocks.{number - 1}.{last}"
    return numbers


def _layer(block: str, place: int, name: str) -> dict[tuple[str, str, int], str]:
    return {(block, "resnets", place): f"{name}.0", (block, "attentions", place): f"{name}.1"}


def _blocks(layers: set[tuple[str, str, int]], prefix: str) -> list[tuple[str, int]]:
    """(block, how many resnets it has), by number."""
    blocks = sorted({block for block, _, _ in layers if block.startswith(prefix)}, key=lambda b: int(b.split(".")[1]))
    return [(block, sum(b == block and kind == "resnets" for b, kind, _ in layers)) for block in blocks]
