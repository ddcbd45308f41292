"""Complete files of Nunchaku's for tiny models, written from the format's description alone, and what they mean.

Codes, scales, smoothing, branches and biases are random; what a reader has to find is worked out here from those, by
the definitions, and never from the packed tensors.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.peer import layout
from tests.peer.names import (
    CLASSES,
    LONG,
    RENAMED,
    SHORT,
    SUFFIXES,
    WITHOUT_WTSCALE,
    WITHOUT_ZERO_BIASES,
    Packed,
    packed_linears,
)
from tests.tiny import MODELS, TEXT_ENCODERS, randomise

SHIFT = 0.171875
E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])
CHANGES: dict[str, dict[str, Any]] = {  # one block of each kind, and sizes that no tile divides
    "flux": dict(num_layers=1, num_single_layers=1),
    "qwen_image": dict(num_layers=1),
    "z_image": dict(n_layers=1),  # 96 channels
    "sdxl": dict(block_out_channels=(32, 96)),
    "sana": dict(num_layers=1, num_attention_heads=5, num_cross_attention_heads=5, cross_attention_head_dim=32,
                 cross_attention_dim=160),
    "t5": dict(d_model=128, num_heads=4, d_ff=256, num_layers=1),
}
OUT = ("out_proj", "out_proj_context", "attn.to_out.0", "attn.to_add_out")  # into which smoothing may be fused


@dataclass(frozen=True)
class Recipe:
    """What kind of file."""

    family: str
    precision: str = "int4"
    dtype: torch.dtype = torch.bfloat16
    rank: int = 32
    heads: int = 2  # FLUX: 3 make 192 channels
    other_suffixes: bool = False
    legacy: bool = False  # a folder of two files
    fused: bool = False  # the smoothing of attentions' outputs is in the layer before
    second_scale: str = ""  # of NVFP4: "wtscale", "wcscales" or "both" for every linear
    zeros: float | None = -7.0  # wzeros in scales; None: any
    dense_refiners: bool = False
    pag: bool = False
    seed: int = 0

    @property
    def suffixes(self) -> dict[str, str]:
        usual = SUFFIXES[self.family]
        return usual if not self.other_suffixes else {id(SHORT): LONG, id(LONG): SHORT}[id(usual)]

    def __str__(self) -> str:
        more = [name for name in ("other_suffixes", "legacy", "fused", "dense_refiners", "pag") if getattr(self, name)]
        more += [f"heads{self.heads}"] * (self.heads != 2) + [self.second_scale] * bool(self.second_scale)
        more += [f"zeros{self.zeros}"] * (self.zeros != -7.0)
        return "-".join([self.family, self.precision, str(self.dtype)[6:], f"r{self.rank}", *more])


@dataclass
class Part:
    """A linear, or some of its input columns."""

    residual: Tensor  # (n, k) fp32, dequantized
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    shifted: bool = False
    divisor: Tensor | None = None  # its input arrives divided by it

    def effective(self) -> Tensor:
        """fp64: deq(R)/smooth + up·down."""
        weight = self.residual.double()
        if self.smooth is None:
            return weight
        return weight / self.smooth.double() + self.up.double() @ self.down.double()


@dataclass
class Truth:
    """What the file says of one module of diffusers'. bias: as the network adds it, fp64."""

    parts: list[Part]
    bias: Tensor | None = None


@dataclass
class PeerFile:
    recipe: Recipe
    model: nn.Module  # diffusers', of the file's dtype, whose 16-bit tensors are the file's
    inputs: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    truths: dict[str, Truth] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path = Path()

    def dense(self) -> nn.Module:
        """The plain model, fp32, that the file stands for."""
        state = {name: tensor.float() for name, tensor in self.model.state_dict().items()}
        for name, truth in self.truths.items():
            weight = torch.cat([part.effective() for part in truth.parts], 1)
            state[f"{name}.weight"] = weight.float().reshape(state[f"{name}.weight"].shape)
            if truth.bias is not None:
                state[f"{name}.bias"] = truth.bias.float()
        model = type(self.model)(self.model.config) if self.recipe.family == "t5" else \
            type(self.model).from_config(dict(self.model.config))
        model.load_state_dict(state)
        return model.eval()


def tiny_model(recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    changes = CHANGES[recipe.family] | ({"num_attention_heads": recipe.heads} if recipe.heads != 2 else {})
    if recipe.family == "t5":
        model, inputs = TEXT_ENCODERS["t5"]()
        new = type(model)(type(model.config).from_dict(model.config.to_dict() | changes))
    else:
        model, inputs = MODELS[recipe.family]()
        new = type(model).from_config({**model.config, **changes})
    return randomise(new, seed=recipe.seed + 11, dtype=recipe.dtype), inputs


class Maker:
    """Draws the numbers of every linear and puts them where the format wants them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.dtype = recipe, recipe.dtype
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.file = PeerFile(recipe, *tiny_model(recipe))
        self.orig: dict[str, Tensor] = {}  # one per block: its attention's outputs are divided alike

    # ---------------------------------------------------------------------------------------------------- numbers
    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=self.random)).to(self.dtype)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.random)

    def codes(self, n: int, k: int) -> Tensor:
        return torch.randint(0, 16, (n, k), generator=self.random, dtype=torch.uint8)

    def shape(self, module: str) -> tuple[int, int]:
        weight = self.file.model.get_parameter(f"{module}.weight")
        return weight.shape[0], weight.shape[1]

    def columns(self, item: Packed) -> tuple[int, int]:
        k = self.shape(item.modules[0])[1]
        if not item.columns:
            return 0, k
        mlp = self.shape(item.modules[0].replace("proj_out", "proj_mlp"))[0]
        return (0, k - mlp) if item.columns == "attention" else (k - mlp, k)

    def has_bias(self, module: str) -> bool:
        return self.file.model.get_submodule(module).bias is not None

    # ------------------------------------------------------------------------------------------------------- W4A4
    def w4a4(self, item: Packed, known: bool = True) -> None:
        first, last = self.columns(item)
        k, fp4 = last - first, self.recipe.precision == "nvfp4"
        smooth, orig = self.smoothing(item, k)
        down, whole_scale = self.normal(self.recipe.rank, k, std=0.5 * k**-0.5), None
        if fp4 and self.second_scale(item) in ("wtscale", "both"):
            whole_scale = torch.tensor([0.125 * 2.0 ** -int(math.log2(k) / 2)]).to(self.dtype) \
                if self.second_scale(item) == "both" else self.between(0.1, 0.3, 1).mul_(k**-0.5).to(self.dtype)
        made: list[dict[str, Tensor]] = []
        for module in item.modules:
            rows, part = self.rows(item, self.shape(module)[0], k, whole_scale)
            part.smooth, part.down, part.up = smooth, down, rows["up"]
            part.shifted = item.after_gelu and not fp4
            part.divisor = None if orig is smooth else orig
            rows["bias"], bias = self.biases(item, module, part)
            made.append(rows)
            if known:
                truth = self.file.truths.setdefault(module, Truth([]))
                truth.parts.append(part)
                truth.bias = bias if item.columns != "attention" else None
        self.write_w4a4(item, made, k, {"smooth": smooth, "smooth_orig": orig, "down": down}, whole_scale)

    def smoothing(self, item: Packed, k: int) -> tuple[Tensor, Tensor]:
        drawn = torch.exp(0.3 * torch.randn(k, generator=self.random)).to(self.dtype)
        if not (self.recipe.fused and item.name.endswith(OUT)):
            return drawn, drawn
        block = ".".join(item.name.split(".")[:2])
        return torch.ones(k, dtype=self.dtype), self.orig.setdefault(block, drawn)

    def second_scale(self, item: Packed) -> str:
        if self.recipe.family in WITHOUT_WTSCALE:
            return "wcscales"
        return self.recipe.second_scale or ("wtscale" if len(item.modules) == 1 else "wcscales")

    def rows(self, item: Packed, n: int, k: int, whole_scale: Tensor | None) -> tuple[dict[str, Tensor], Part]:
        """What each row has of its own, and the dequantized weight."""
        codes, up = self.codes(n, k), self.normal(n, self.recipe.rank, std=self.recipe.rank**-0.5)
        if self.recipe.precision == "int4":
            scales = self.between(0.1, 0.3, n, -(-k // 64)).mul_(k**-0.5).to(self.dtype)
            values = torch.where(codes >= 8, codes.int() - 16, codes.int()).float()
            residual = values * scales.float().repeat_interleave(64, 1)[:, :k]
            return {"codes": codes, "scales": scales, "up": up}, Part(residual)
        scales = self.between(0.3, 2.5, n, -(-k // 16)).to(torch.float8_e4m3fn)
        residual = E2M1[codes.int()] * scales.float().repeat_interleave(16, 1)[:, :k]
        rows, channel = {"codes": codes, "scales": scales, "up": up}, torch.ones(n)
        kind = self.second_scale(item)
        if kind != "wtscale":  # a joined linear's are those of the modules, unless each row has its own
            each = n if self.recipe.second_scale else 1
            size = 2.0 if kind == "both" else k**-0.5
            rows["channel"] = self.between(0.1, 0.3, each).mul_(size).to(self.dtype).expand(n).clone()
            channel = channel * rows["channel"].float()
        if whole_scale is not None:
            channel = channel * whole_scale.float()
        return rows, Part(residual * channel[:, None])

    def biases(self, item: Packed, module: str, part: Part) -> tuple[Tensor, Tensor | None]:
        """(as stored, in the file's dtype; as the network adds it)."""
        n = part.residual.shape[0]
        if not self.has_bias(module) or item.columns == "attention":
            return torch.zeros(n, dtype=self.dtype), None
        drawn = self.normal(n, std=0.2)
        if not part.shifted:
            return drawn, drawn.double()
        correction = SHIFT * (part.residual.double() / part.smooth.double()).sum(1)
        stored = (drawn.double() - correction).to(self.dtype)
        return stored, stored.double() + correction

    def write_w4a4(self, item: Packed, made: list[dict[str, Tensor]], k: int, shared: dict[str, Tensor],
                   whole_scale: Tensor | None) -> None:
        rows = {name: self.arranged(item, [one[name] for one in made], 1.0 if name in ("scales", "channel") else 0.0)
                for name in made[0]}
        n, columns = layout.whole(rows["codes"].shape[0], 128), layout.whole(k, 128)
        fp4, names, put = self.recipe.precision == "nvfp4", self.recipe.suffixes, self.put
        groups, order = (columns // 16, layout.micro_scales) if fp4 else (columns // 64, layout.scales)
        put(item, "qweight", layout.weight(layout.padded(rows["codes"], n, columns)))
        put(item, "wscales", order(layout.padded(rows["scales"], n, groups, fill=1)))
        put(item, names["up"], layout.up(layout.padded(rows["up"], n, self.recipe.rank)))
        put(item, names["down"], layout.down(layout.padded(shared["down"], self.recipe.rank, columns)))
        for leaf in ("smooth", "smooth_orig"):
            put(item, names[leaf], layout.vector(layout.padded(shared[leaf], columns, fill=1)))
        if self.recipe.family not in WITHOUT_ZERO_BIASES or self.has_bias(item.modules[0]):
            put(item, "bias", layout.vector(layout.padded(rows["bias"], n, fill=1)))
        if whole_scale is not None:
            put(item, "wtscale", whole_scale)
        if "channel" in rows:
            put(item, "wcscales", layout.vector(layout.padded(rows["channel"], n, fill=1)))

    def arranged(self, item: Packed, parts: list[Tensor], fill: float) -> Tensor:
        if item.order == "heads":
            size = layout.whole(parts[0].shape[0], 128)
            return layout.by_heads(*(layout.padded(part, size, *part.shape[1:], fill=fill) for part in parts))
        return layout.spread(torch.cat(parts), 2) if item.order == "pairs" else torch.cat(parts)

    def put(self, item: Packed, leaf: str, tensor: Tensor) -> None:
        self.file.tensors[f"{item.name}.{leaf}"] = tensor.contiguous()

    # ------------------------------------------------------------------------------------------------------ W4A16
    def awq(self, item: Packed) -> None:
        n, k = self.shape(item.modules[0])
        codes, scales = self.codes(n, k), self.between(0.1, 0.3, n, k // 64).mul_(k**-0.5).to(self.dtype)
        wanted = self.between(-9, -6, n, k // 64) if self.recipe.zeros is None else self.recipe.zeros
        zeros = (scales.float() * wanted).to(self.dtype)
        bias = self.normal(n, std=0.2).float()
        plus_one = torch.zeros(n)
        for s in {1, item.kinds - 2}:
            plus_one[s * (n // item.kinds):(s + 1) * (n // item.kinds)] = 1
        stored = (bias + plus_one).to(self.dtype)
        part = Part(_affine(codes, scales, zeros, 64))
        self.file.truths[item.modules[0]] = Truth([part], stored.double() - plus_one.double())
        self.put(item, "qweight", layout.awq(layout.spread(codes, item.kinds)).view(torch.int32))
        self.put(item, "wscales", layout.awq_scales(layout.spread(scales, item.kinds), 16))
        self.put(item, "wzeros", layout.awq_scales(layout.spread(zeros, item.kinds), 16))
        self.put(item, "bias", layout.spread(stored, item.kinds))

    def t5(self, item: Packed) -> None:
        n, k = self.shape(item.modules[0])
        codes, scales = self.codes(n, k), self.between(0.1, 0.3, n, k // 128).mul_(k**-0.5).to(self.dtype)
        zeros = (scales.float() * self.between(-9, -6, n, k // 128)).to(self.dtype)
        self.file.truths[item.modules[0]] = Truth([Part(_affine(codes, scales, zeros, 128))])
        self.put(item, "qweight", layout.awq(codes))
        self.put(item, "scales", layout.awq_scales(scales, 8))
        self.put(item, "scaled_zeros", layout.awq_scales(zeros, 8))

    # ----------------------------------------------------------------------------------------------------- 16 bit
    def others(self) -> None:
        recipe, state, found = self.recipe, dict(self.file.model.state_dict()), self.file.tensors
        for name in [name for name in state if name.rpartition(".")[0] in self.file.truths]:
            del state[name]
        if recipe.family == "sana":
            block = "transformer_blocks.0"
            for leaf in ("weight", "bias"):
                pair = [state.pop(f"{block}.attn2.{name}.{leaf}") for name in ("to_k", "to_v")]
                found[f"{block}.cross_attn.kv_linear.{leaf}"] = torch.cat(pair)
                depth = layout.spread(state[f"{block}.ff.conv_depth.{leaf}"], 2)
                state[f"{block}.ff.conv_depth.{leaf}"] = depth.permute(0, 2, 3, 1) if depth.ndim == 4 else depth
        if recipe.dense_refiners:
            for block in ("noise_refiner.0.feed_forward", "context_refiner.0.feed_forward"):
                value, gate, out = (state.pop(f"{block}.{name}.weight") for name in ("w3", "w1", "w2"))
                found[f"{block}.net.0.proj.weight"] = torch.cat((value, gate))
                found[f"{block}.net.2.weight"] = out
        names = {f"{block}.{old}": f"{block}.{new}" for block, table in RENAMED.get(recipe.family, ())
                 for old, new in table.items()}
        for name, tensor in state.items():
            found[names.get(name, name)] = tensor.clone().contiguous()

    def describe(self) -> None:
        recipe, model = self.recipe, self.file.model
        text = model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string()
        fp4 = recipe.precision == "nvfp4"
        numbers = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": 16 if fp4 else 64}
        quantization = {"method": "svdquant", "rank": recipe.rank,
                        "weight": {**numbers, "scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
                        "activation": {**numbers, "scale_dtype": "fp8_e4m3_nan" if fp4 else None}}
        if recipe.family == "z_image":
            quantization["skip_refiners"] = recipe.dense_refiners
        self.file.metadata = {"config": text, "model_class": CLASSES[recipe.family],
                              "quantization_config": json.dumps(quantization)}
        if recipe.family == "flux":
            comfy = {"model_class": "Flux", "model_config": {"image_model": "flux", "hidden_size": 64 * recipe.heads}}
            self.file.metadata["comfy_config"] = json.dumps(comfy)


def _affine(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    wide = [tensor.double().repeat_interleave(group, 1) for tensor in (scales, zeros)]
    return (codes.double() * wide[0] + wide[1]).float()


def make(recipe: Recipe) -> PeerFile:
    """The tensors and what they mean, not written yet."""
    maker = Maker(recipe)
    for item in packed_linears(recipe.family, recipe.dense_refiners):
        {"w4a4": maker.w4a4, "awq": maker.awq, "t5": maker.t5}[item.kind](item)
    if recipe.pag:
        maker.w4a4(Packed("transformer_blocks.0.attn.pag_to_v", ("transformer_blocks.0.attn1.to_v",)), known=False)
    maker.others()
    maker.describe()
    return maker.file


def write(file: PeerFile, folder: Path) -> PeerFile:
    """One file, or the older folder of two."""
    if not file.recipe.legacy:
        file.path = folder / f"{file.recipe}.safetensors"
        save_file(file.tensors, file.path, metadata=file.metadata)
        return file
    file.path = folder / str(file.recipe)
    file.path.mkdir()
    inside = {name for name in file.tensors if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    for name, chosen in (("transformer_blocks", inside), ("unquantized_layers", set(file.tensors) - inside)):
        save_file({key: file.tensors[key] for key in chosen}, file.path / f"{name}.safetensors")
    for key in ("config", "comfy_config"):
        (file.path / f"{key}.json").write_text(file.metadata[key])
    return file
