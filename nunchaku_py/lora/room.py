"""Room for adapters: ranks that are there, zero, before any adapter is. Then adapters come, go and change without any
tensor changing its shape or place: compiled models are not compiled again, and captured CUDA graphs stay valid."""
from __future__ import annotations

from ..errors import NunchakuError
from ..swap import quantized_models, quantized_sites
from .branch import fold


def reserve_lora(target: object, rank: int) -> None:
    """Reserve `rank` ranks for adapters in every quantized linear of a model, or of a pipeline's models; 0 gives them
    back. Adapters that need more get a multiple of it. What is reserved is computed with, used or not."""
    if type(rank) is not int or rank < 0:
        raise NunchakuError(f"reserve_lora: rank is a whole number from 0 on, not {rank!r}")
    for model in quantized_models(target):
        for site in quantized_sites(model):
            site.adapter_room = rank
            fold(site)
