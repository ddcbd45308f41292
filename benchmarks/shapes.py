"""The linears of real models, as data: name, N, K, how many there are, and the tokens they see at 512² and 1024².

Widths, counts and configurations belong together: tests/benchmarks/test_shapes.py builds every model on the meta device
from CONFIGS and finds each linear below in it.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from nunchaku_py.bench.known import KNOWN

# What a linear reads and what reads it, as far as it decides how it is quantized and what it can be fused with.
Role = Literal[
    "qkv",         # several linears read one normalized input
    "out",         # reads attention; gate and residual follow
    "up",          # followed by GELU
    "geglu",       # followed by value·GELU(gate)
    "down",        # reads GELU's output; gate and residual follow
    "glu_down",    # reads GEGLU's output, which no shift makes non-negative; the residual follows
    "single_out",  # reads attention beside GELU's output: two parts along K
    "modulation",  # one row per sample
]
RESOLUTIONS = (512, 1024)

# The models of the table below, and the arguments that make them of diffusers' classes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (KNOWN[known].cls, KNOWN[known].config)
    for name, known in {"flux": "flux.1-dev", "qwen": "qwen-image", "sd35": "sd3.5-large", "sdxl": "sdxl"}.items()}


@dataclass(frozen=True)
class Layer:
    """`count` linears (N,K) of one model that do the same, and the rows of one of them for one image.

    modules: a glob of their names, which together with the shape finds them.
    """

    model: str
    name: str
    n: int
    k: int
    role: Role
    count: int
    tokens: tuple[int, int]  # at 512², 1024²
    modules: str

    @property
    def parts(self) -> tuple[int, ...]:
        """The widths along K that are quantized apart."""
        return (3072, self.k - 3072) if self.role == "single_out" else (self.k,)


# Image tokens at 512² and 1024²: the latent is 1/8 of the image wide, and FLUX, SD3.5 and Qwen-Image take 2×2 patches.
IMAGE = (1024, 4096)
T5 = (512, 512)  # FLUX pads its prompt to 512 tokens
JOINT = (1536, 4608)
CLIP_T5 = (333, 333)  # SD3.5: 77 of CLIP, 256 of T5
WIDE, DEEP = (1024, 4096), (256, 1024)  # SDXL: 640 channels at 1/16, 1280 channels at 1/32 of the image
CLIP = (77, 77)
ROW = (1, 1)

LAYERS: tuple[Layer, ...] = (
    # FLUX.1: 19 double blocks (image and text streams), 38 single blocks; width 3072 = 24 heads of 128
    Layer("flux", "double.qkv", 3072, 3072, "qkv", 57, IMAGE, "transformer_blocks.*.attn.to_[qkv]"),
    Layer("flux", "double.out", 3072, 3072, "out", 19, IMAGE, "transformer_blocks.*.attn.to_out.0"),
    Layer("flux", "double.up", 12288, 3072, "up", 19, IMAGE, "transformer_blocks.*.ff.net.0.proj"),
    Layer("flux", "double.down", 3072, 12288, "down", 19, IMAGE, "transformer_blocks.*.ff.net.2"),
    Layer("flux", "text.qkv", 3072, 3072, "qkv", 57, T5, "transformer_blocks.*.attn.add_[qkv]_proj"),
    Layer("flux", "text.out", 3072, 3072, "out", 19, T5, "transformer_blocks.*.attn.to_add_out"),
    Layer("flux", "text.up", 12288, 3072, "up", 19, T5, "transformer_blocks.*.ff_context.net.0.proj"),
    Layer("flux", "text.down", 3072, 12288, "down", 19, T5, "transformer_blocks.*.ff_context.net.2"),
    Layer("flux", "single.qkv", 3072, 3072, "qkv", 114, JOINT, "single_transformer_blocks.*.attn.to_[qkv]"),
    Layer("flux", "single.up", 12288, 3072, "up", 38, JOINT, "single_transformer_blocks.*.proj_mlp"),
    Layer("flux", "single.out", 3072, 15360, "single_out", 38, JOINT, "single_transformer_blocks.*.proj_out"),
    Layer("flux", "double.modulation", 18432, 3072, "modulation", 38, ROW, "transformer_blocks.*.norm1*.linear"),
    Layer("flux", "single.modulation", 9216, 3072, "modulation", 38, ROW, "single_transformer_blocks.*.norm.linear"),
    # SDXL: 10 transformer blocks of 640 channels, 60 of 1280
    Layer("sdxl", "640.qkv", 640, 640, "qkv", 30, WIDE, "*.attn1.to_[qkv]"),
    Layer("sdxl", "640.out", 640, 640, "out", 20, WIDE, "*.attn[12].to_out.0"),
    Layer("sdxl", "640.cross_q", 640, 640, "out", 10, WIDE, "*.attn2.to_q"),
    Layer("sdxl", "640.cross_kv", 640, 2048, "qkv", 20, CLIP, "*.attn2.to_[kv]"),
    Layer("sdxl", "640.geglu", 5120, 640, "geglu", 10, WIDE, "*.ff.net.0.proj"),
    Layer("sdxl", "640.down", 640, 2560, "glu_down", 10, WIDE, "*.ff.net.2"),
    Layer("sdxl", "1280.qkv", 1280, 1280, "qkv", 180, DEEP, "*.attn1.to_[qkv]"),
    Layer("sdxl", "1280.out", 1280, 1280, "out", 120, DEEP, "*.attn[12].to_out.0"),
    Layer("sdxl", "1280.cross_q", 1280, 1280, "out", 60, DEEP, "*.attn2.to_q"),
    Layer("sdxl", "1280.cross_kv", 1280, 2048, "qkv", 120, CLIP, "*.attn2.to_[kv]"),
    Layer("sdxl", "1280.geglu", 10240, 1280, "geglu", 60, DEEP, "*.ff.net.0.proj"),
    Layer("sdxl", "1280.down", 1280, 5120, "glu_down", 60, DEEP, "*.ff.net.2"),
    # SD3.5-large: 38 blocks of width 2432 = 38 heads of 64; the last one has no text output
    Layer("sd35", "image.qkv", 2432, 2432, "qkv", 114, IMAGE, "transformer_blocks.*.attn.to_[qkv]"),
    Layer("sd35", "image.out", 2432, 2432, "out", 38, IMAGE, "transformer_blocks.*.attn.to_out.0"),
    Layer("sd35", "image.up", 9728, 2432, "up", 38, IMAGE, "transformer_blocks.*.ff.net.0.proj"),
    Layer("sd35", "image.down", 2432, 9728, "down", 38, IMAGE, "transformer_blocks.*.ff.net.2"),
    Layer("sd35", "text.qkv", 2432, 2432, "qkv", 114, CLIP_T5, "transformer_blocks.*.attn.add_[qkv]_proj"),
    Layer("sd35", "text.out", 2432, 2432, "out", 37, CLIP_T5, "transformer_blocks.*.attn.to_add_out"),
    Layer("sd35", "text.up", 9728, 2432, "up", 37, CLIP_T5, "transformer_blocks.*.ff_context.net.0.proj"),
    Layer("sd35", "text.down", 2432, 9728, "down", 37, CLIP_T5, "transformer_blocks.*.ff_context.net.2"),
    Layer("sd35", "modulation", 14592, 2432, "modulation", 75, ROW, "transformer_blocks.*.norm1*.linear"),
    # Qwen-Image: 60 blocks of width 3072. The text stream has the same shapes, and a row for each token of the prompt
    Layer("qwen", "image.qkv", 3072, 3072, "qkv", 180, IMAGE, "transformer_blocks.*.attn.to_[qkv]"),
    Layer("qwen", "image.out", 3072, 3072, "out", 60, IMAGE, "transformer_blocks.*.attn.to_out.0"),
    Layer("qwen", "image.up", 12288, 3072, "up", 60, IMAGE, "transformer_blocks.*.img_mlp.net.0.proj"),
    Layer("qwen", "image.down", 3072, 12288, "down", 60, IMAGE, "transformer_blocks.*.img_mlp.net.2"),
    Layer("qwen", "modulation", 18432, 3072, "modulation", 120, ROW, "transformer_blocks.*.*_mod.1"),
)


@dataclass(frozen=True)
class Case:
    """One product to measure: M rows through one layer. `label` tells where it occurs."""

    layer: Layer
    m: int
    label: str


def cases(globs: Sequence[str], resolutions: Iterable[int], layers: Sequence[Layer] = LAYERS) -> list[Case]:
    """Every layer whose "model/name" matches a glob, at every resolution, each (M, N, K, parts) once.

    A case stands for all that coincide with it; the label is the first one's. Modulation is left out: see `small`.
    """
    found: dict[tuple[int, int, tuple[int, ...], bool], Case] = {}
    for layer, resolution in _pairs(globs, resolutions, layers):
        if layer.role != "modulation":
            m = layer.tokens[RESOLUTIONS.index(resolution)]
            case = Case(layer, m, f"{layer.model}/{layer.name} {resolution}²")
            found.setdefault((m, layer.n, layer.parts, layer.role == "down"), case)
    return list(found.values())


def small(globs: Sequence[str], rows: Iterable[int], layers: Sequence[Layer] = LAYERS) -> list[Case]:
    """The modulation layers with `rows` samples, each shape once."""
    found: dict[tuple[int, int, int], Case] = {}
    for layer, m in _pairs(globs, rows, layers):
        if layer.role == "modulation":
            found.setdefault((m, layer.n, layer.k), Case(layer, m, f"{layer.model}/{layer.name}, {m} rows"))
    return list(found.values())


def _pairs(globs: Sequence[str], numbers: Iterable[int], layers: Sequence[Layer]) -> Iterator[tuple[Layer, int]]:
    chosen = [layer for layer in layers if any(fnmatchcase(f"{layer.model}/{layer.name}", glob) for glob in globs)]
    return ((layer, number) for number in numbers for layer in chosen)
