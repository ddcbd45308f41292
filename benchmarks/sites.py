"""Quantized linears made quickly, for timing: round-to-nearest beside a random low-rank branch.

Any pair up·low leaves a valid site, since R = W·diag(smooth) − up·low is what gets quantized. So the output error is
that of rounding; a recipe's search makes it smaller, and changes nothing at run time.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from nunchaku_py.engine import GELU_SHIFT
from nunchaku_py.linear import QuantLinear
from nunchaku_py.site import Site, SiteTensors, shift_correction
from nunchaku_py.split_linear import SplitLinear
from nunchaku_py.tensor import QTensor

GROUPS = {"int4": 64, "nvfp4": 16}
BRANCH = 0.05  # size of the random pair's product, in units of the weight


@dataclass(frozen=True)
class Setting:
    """How our side stores a weight and which activation mode it runs in."""

    format: str = "int4"
    rank: int = 32
    mode: str = "a8"
    kind: str = "w4a4"

    def __str__(self) -> str:
        kind = f"{self.format} rank {self.rank}" if self.kind == "w4a4" else f"{self.format} weight-only"
        return f"{self.mode}, {kind}"

    def site(self, gelu: bool) -> Site:
        shifted = gelu and self.kind == "w4a4" and self.format == "int4"
        return Site(self.kind, self.format, GROUPS[self.format], self.rank if self.kind == "w4a4" else 0,
                    GELU_SHIFT if shifted else 0.0, shifted)


def quantized(linear: nn.Linear, setting: Setting, gelu: bool = False, parts: Sequence[int] = ()
              ) -> QuantLinear | SplitLinear:
    """linear in `setting`, packed. gelu: its input (of several parts: the last one's) is the output of a GELU."""
    n, k = linear.weight.shape
    widths = tuple(parts) or (k,)
    edges = [0, *accumulate(widths)]
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    sites = [setting.site(gelu and k1 == k) for _, k1 in ranges]
    made = [site_tensors(linear.weight[:, k0:k1], site, seed) for seed, (site, (k0, k1))
            in enumerate(zip(sites, ranges, strict=True))]
    bias = _bias(linear, sites, made)
    if len(sites) > 1:
        module = SplitLinear(sites, ranges, n, True, torch.bfloat16)
        for part, tensors in zip(module.parts, made, strict=True):
            part.set_tensors(tensors)
        module.set_tensor("bias", bias)
    else:
        module = QuantLinear(sites[0], k, n, True, torch.bfloat16)
        module.set_tensors(replace(made[0], bias=bias))
    for site in sites_of(module):
        site.set_mode(setting.mode)
    return module


def sites_of(module: QuantLinear | SplitLinear) -> list:
    return list(module.parts) if isinstance(module, SplitLinear) else [module]


def site_tensors(weight: Tensor, site: Site, seed: int) -> SiteTensors:
    """The tensors of a site for weight (N,K), without a bias."""
    generator, wide = torch.Generator().manual_seed(seed), weight.float()
    n, k = wide.shape
    if not site.has_smooth:
        return SiteTensors(QTensor.quantize(wide, site.weight_format, search=False))
    smooth = torch.empty(k).uniform_(0.9, 1.1, generator=generator).bfloat16()
    down = up = None
    residual = wide * smooth.float()
    if site.rank:
        size = (BRANCH * residual.std() / site.rank**0.5).sqrt()
        up = (torch.randn(n, site.rank, generator=generator) * size).bfloat16()
        down = (torch.randn(site.rank, k, generator=generator) * size / smooth.float()).bfloat16()
        residual -= up.float() @ (down.float() * smooth.float())
    return SiteTensors(QTensor.quantize(residual, site.weight_format, search=False), smooth, down, up)


def _bias(linear: nn.Linear, sites: Sequence[Site], made: Sequence[SiteTensors]) -> Tensor:
    """The linear's own, less what the shifts of its parts add."""
    shifted = [(site, tensors) for site, tensors in zip(sites, made, strict=True) if site.shift]
    if not shifted:
        return linear.bias.detach().clone()
    return linear.bias.float() - sum(shift_correction(tensors.weight, tensors.smooth, site.shift)
                                     for site, tensors in shifted)
