"""Errors of single quantized layers in every activation mode, and what folding their weights to INT8 takes part in it.

    python -m benchmarks.quality.modes [--quick] [--out CSV]       rows, and beside them the summary as Markdown
    python -m benchmarks.quality.modes --report [--out CSV]        the summary alone, from the rows

a4, a8, a16: ‖Y − Ŷ‖/‖Y‖, Y the 16-bit weight times the input in fp32, Ŷ what the quantized module returns in bf16.
Inputs of the trained miniatures' layers are what the 16-bit model gives them while it paints held-out prompts; random
layers have random ones. Calibration has seen neither. weight …: ‖found − R‖/‖R‖ of the weight R that is rounded to 4
bit. fold …: ‖folded − 4 bit‖/‖4 bit‖ of it. output fold …: ‖x̂·(folded − 4 bit)ᵀ‖/‖Y‖. "127": with max|w|/127 for the
INT8 scale of a row, "best": with the best of 111 scales.
"""
from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.machine import ROOT, provenance
from benchmarks.quality.mode_report import write_report
from benchmarks.quality.picture_cells import Extent
from benchmarks.quality.picture_subjects import Subject
from benchmarks.quality.synthetic import layer, stats_of
from benchmarks.rows import Origin, RowFile
from nunchaku_py import quantize
from nunchaku_py.formats import INT8, encode
from nunchaku_py.linear import QuantizedSite, QuantLinear
from nunchaku_py.methods.export import export
from nunchaku_py.methods.work import Context, Stats, Work
from nunchaku_py.recipes import RECIPES
from nunchaku_py.site import MODES, Mode, Site
from nunchaku_py.split_linear import SplitLinear
from nunchaku_py.swap import quantized_modules

CSV = ROOT / "benchmarks/results/quality_modes.csv"
FORMATS = ("int4", "nvfp4")
RANK, RANDOM_RANK = 16, 32
TOKENS = 64  # of a call, evenly spread
ROWS = 256  # of a weight at most, evenly spread, on which folding is looked at
SCALES = [90 + 0.5 * i for i in range(111)]  # max|w| over the scale of a row
POST_GELU = "post-GELU"
BARS = {POST_GELU: 0.95}  # of a8's error over a4's; SIGNED for all other kinds
SIGNED = 0.75
KINDS = {("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"): "q, k, v",
         ("to_out.0", "to_add_out"): "attention out", ("net.0.proj", "proj_mlp"): "feed-forward in"}


@dataclass
class Row(Origin):
    source: str
    data: str
    format: str
    layer: str
    kind: str
    n: int
    k: int
    a4: float
    a8: float
    a16: float
    ratio: float  # a8 over a4
    bar: float
    weight: float
    weight_127: float
    weight_folded: float
    fold_127: float
    fold: float
    fold_best: float
    output_fold_127: float
    output_fold: float
    output_fold_best: float


class Layer(NamedTuple):
    """One quantized site (a linear, or a K-part of one), its 16-bit weight and held-out inputs."""

    name: str
    kind: str
    site: QuantizedSite
    weight: Tensor  # (N,K)
    x: Tensor  # (T,K) bf16


# ------------------------------------------------------------------------------------------------- trained layers
def kind_of(name: str, part: int | None, geglu: bool) -> str:
    """What makes the input of a layer. The second part of a FLUX block's proj_out reads a GELU, the first attention."""
    if part is not None:
        return ("attention out", POST_GELU)[part]
    named = (kind for suffixes, kind in KINDS.items() if name.endswith(suffixes))
    return next(named, "after GEGLU" if geglu else POST_GELU)


def inputs_of(model: nn.Module, names: Mapping[str, object], subject: Subject) -> dict[str, Tensor]:
    """Rows of what these modules are given along the held-out trajectory."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def listen(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            x = (x.movedim(-3, -1) if isinstance(module, nn.Conv2d) else x).flatten(0, -2)
            seen[name].append(x[:: max(1, len(x) // TOKENS)].clone())
        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [listen(name) for name in names]
    try:
        subject.measured(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def trained(subject: Subject, fmt: str, calibrated: bool, states: int = 64) -> Iterator[Layer]:
    """The W4A4 layers of a miniature, quantized by the shipped recipe."""
    model = copy.deepcopy(subject.denoiser)
    data = subject.calibration(0) if calibrated else None
    quantize(model, f"svdquant-{fmt}", data, "a4", rank=RANK, states=states, progress=False)
    modules = quantized_modules(model)
    inputs, geglu = inputs_of(subject.denoiser, modules, subject), subject.name == "tiny-sdxl"
    for name, module in modules.items():
        weight, x = subject.denoiser.get_submodule(name).weight.detach().flatten(1), inputs[name]
        if isinstance(module, SplitLinear):
            for i, (site, (k0, k1)) in enumerate(zip(module.parts, module.ranges, strict=True)):
                yield Layer(f"{name}[{k0}:{k1}]", kind_of(name, i, geglu), site, weight[:, k0:k1], x[:, k0:k1])
        elif module.site.kind == "w4a4":
            yield Layer(name, kind_of(name, None, geglu), module, weight, x)


# -------------------------------------------------------------------------------------------------- random layers
def random_layer(size: int, fmt: str, gelu: bool, gaussian: bool, calibrated: bool, seed: int = 0) -> Layer:
    """synthetic.layer (heavy-tailed), or gaussian weights with the same inputs."""
    data = layer(size, size, seed, gelu)
    weight = data.weight
    if gaussian:
        weight = 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    shifted = gelu and fmt == "int4"
    site = Site("w4a4", fmt, 64 if fmt == "int4" else 16, RANDOM_RANK, 0.171875 if shifted else 0.0, shifted)
    stats = stats_of(data.calibration) if calibrated else Stats.white(size, gelu, seed)
    work, recipe, context = Work.of(["layer"], [weight], site, stats), RECIPES[f"svdquant-{fmt}"], Context(seed=seed)
    for step in recipe.steps if calibrated else recipe.steps_data_free:
        step(work, context)
    tensors, = export(work, context)
    module = QuantLinear(site, size, size, tensors.bias is not None, torch.bfloat16)
    module.set_tensors(tensors)
    name = f"{'gaussian' if gaussian else 'heavy-tailed'} {size}x{size}"
    return Layer(name, POST_GELU if gelu else "signed", module, weight, data.held_out.bfloat16())


# ------------------------------------------------------------------------------------------------------- measuring
def product_of(site: QuantizedSite, x: Tensor, mode: Mode) -> Tensor:
    """What a site makes of rows x in a mode, without the bias of the linear; a part's shift is undone by the whole."""
    site.set_mode(mode)
    y = site.apply_rows(x).float()
    if site.bias is not None:
        return y - site.effective_bias().float()
    return y - site.correction() if mode == "a4" and site.site.shift else y


def relative(found: Tensor, expected: Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


@torch.no_grad()
def errors_of(item: Layer) -> dict[str, float]:
    """a4, a8, a16."""
    y = item.x.float() @ item.weight.float().T
    return {mode: relative(product_of(item.site, item.x, mode), y) for mode in MODES}


def folded_by(w: Tensor, s_ch: Tensor) -> Tensor:
    return encode(w, s_ch[:, None], INT8).float() * s_ch[:, None]


def best_fold(w: Tensor) -> Tensor:
    """Each row by the one of SCALES with the least squared error."""
    top, best = w.abs().amax(1), folded_by(w, w.abs().amax(1) / 127)
    for steps in SCALES:
        found = folded_by(w, top / steps)
        better = (found - w).square().sum(1) < (best - w).square().sum(1)
        best = torch.where(better[:, None], found, best)
    return best


@torch.no_grad()
def folds_of(item: Layer) -> dict[str, float]:
    site, rows = item.site, slice(None, None, max(1, len(item.weight) // ROWS))
    smooth, weight, quantized = site.smooth.float(), item.weight[rows].float(), site.qtensor()
    exact = weight * smooth - site.up[rows].float() @ (site.down.float() * smooth)
    w, (w8, s_ch) = quantized.dequantize()[rows], quantized.fold_int8()
    folds = {"_127": folded_by(w, w.abs().amax(1) / 127), "": w8[rows].float() * s_ch[rows, None],
             "_best": best_fold(w)}
    xhat, scale = item.x.float() / smooth, torch.linalg.vector_norm(item.x.float() @ weight.T)
    out = {"weight": relative(w, exact), "weight_127": relative(folds["_127"], exact),
           "weight_folded": relative(folds[""], exact)}
    out |= {f"fold{name}": relative(found, w) for name, found in folds.items()}
    return out | {f"output_fold{name}": (torch.linalg.vector_norm(xhat @ (found - w).T) / scale).item()
                  for name, found in folds.items()}


def row_of(source: str, data: str, item: Layer) -> Row:
    errors, (n, k) = errors_of(item), item.weight.shape
    return Row(**provenance(), source=source, data=data, format=item.site.site.format, layer=item.name, kind=item.kind,
               n=n, k=k, **errors, ratio=errors["a8"] / errors["a4"], bar=BARS.get(item.kind, SIGNED), **folds_of(item))


def measure(quick: bool) -> Iterator[Row]:
    extent = Extent(prompts=8, steps=3 if quick else 10)
    for name in ("tiny-flux", "tiny-sdxl"):
        for stressed in (False,) if quick else (False, True):
            subject = Subject(name, stressed, extent)
            for data in ("calibrated", "data-free"):
                for fmt in FORMATS:
                    for item in trained(subject, fmt, data == "calibrated"):
                        yield row_of(f"{name}, stressed" if stressed else name, data, item)
    for gaussian in (True, False):
        for data in ("calibrated", "data-free"):
            for gelu in (False, True):
                for fmt in FORMATS:
                    size = 512 if quick else 3072
                    yield row_of("random", data, random_layer(size, fmt, gelu, gaussian, data == "calibrated"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer states, smaller layers")
    parser.add_argument("--report", action="store_true", help="the summary alone")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    if not args.report:
        with RowFile.create(args.out, Row) as file:
            for row in measure(args.quick):
                file.write(row)
    print(write_report(args.out))


if __name__ == "__main__":
    main()
