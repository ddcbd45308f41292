"""Room for adapters, reserved or limited.

Reserved ranks are there, zero, before any adapter is. Then adapters come, go and change without any tensor changing its
shape or place: compiled models are not compiled again, and captured CUDA graphs stay valid. A limit is for many
adapters at once: together they take fewer ranks, where their product is of fewer, nearly.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import NunchakuError
from ..module_tools import adapted_layers
from ..swap import quantized_models, quantized_sites
from .branch import compressed, fold, present


@dataclass(frozen=True)
class Compression:
    """Of `sites` quantized linears that carry adapters: how many are compressed, and from how many ranks to how many,
    in all; the largest share of what the adapters add that is lost by it."""

    sites: int
    compressed: int
    ranks: int
    ranks_after: int
    lost: float

    def __str__(self) -> str:
        return (f"{self.compressed} of {self.sites} linears with adapters compressed, {self.ranks} ranks to "
                f"{self.ranks_after}, at most {self.lost:.2%} of what they add is lost")


def reserve_lora(target: object, rank: int) -> None:
    """Reserve `rank` ranks for adapters in every quantized linear of a model, or of a pipeline's models; 0 gives them
    back. Adapters that need more get a multiple of it. What is reserved is computed with, used or not."""
    if type(rank) is not int or rank < 0:
        raise NunchakuError(f"reserve_lora: rank is a whole number from 0 on, not {rank!r}")
    for model in quantized_models(target):
        for site in quantized_sites(model):
            site.adapter_room = site.adapter_room._replace(reserved=rank)
            fold(site)


def refresh_lora(target: object) -> None:
    """Read the adapters anew that a model, or a pipeline's models, carry: after writes that leave no trace in them
    (`parameter.data.copy_`). Nothing else needs it."""
    for model in quantized_models(target):
        for layer in adapted_layers(model):
            layer.refresh(anew=True)


@torch.no_grad()
def compress_lora(target: object, rank: int | None, tolerance: float = 0.01) -> Compression:
    """Let the adapters of a quantized linear, together, take at most `rank` ranks, where this loses no more than a
    share `tolerance` of what they add (of the norm of their product); None lifts it. It holds for adapters to come, and
    a new strength is then a new decomposition: for adapters that stay as they are."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise NunchakuError(f"compress_lora: rank is a whole number from 1 on, or None, not {rank!r}")
    if not 0 <= tolerance < 1:
        raise NunchakuError(f"compress_lora: tolerance is a share from 0 to below 1, not {tolerance!r}")
    sites, after, worst, count = [], 0, 0.0, 0
    for model in quantized_models(target):
        for site in quantized_sites(model):
            site.adapter_room = site.adapter_room._replace(most=rank, tolerance=tolerance)
            fold(site)
            if site.adapters:
                with present([site]):
                    left, lost = compressed(site)
                sites.append(sum(adapter.rank for adapter in site.adapters))
                after += sum(adapter.rank for adapter in left)
                worst, count = max(worst, lost), count + (left is not site.adapters)
    return Compression(len(sites), count, sum(sites), after, worst)
