"""What a quantization step sees and changes: the statistics of one shared input, the stacked weights that read it,
and the pair + residual they are being turned into.

    Ŵ = W·diag(smooth) ≈ up·low + deq(residual)          (at export down = low/smooth, which reads the raw x)
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import NunchakuError
from ..site import Site
from ..tensor import QTensor

WHITE_ROWS = 64
CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}  # 4 MiB of fp32 stays in a CPU's cache; a GPU wants fewer launches


@dataclass
class Stats:
    """What is known of one input x (K channels), always of the raw x: neither smoothed nor shifted."""

    absmax: Tensor  # (K)
    second: Tensor  # (K) E[x²]
    mean: Tensor  # (K)
    tokens: Tensor  # (T,K) a sample of rows
    gram: Tensor | None = None  # (K,K) E[x xᵀ]
    rows: int = 0  # how many rows the statistics saw
    synthetic: bool = False  # True where nothing is known and noise stands in

    @staticmethod
    def white(k: int, gelu: bool, seed: int = 0, device: torch.device | str = "cpu") -> Stats:
        """The data-free stand-in: unit gaussian rows, or their GELU."""
        x = torch.randn(WHITE_ROWS, k, generator=torch.Generator().manual_seed(seed), device="cpu")
        x = torch.nn.functional.gelu(x) if gelu else x
        ones = torch.ones(k, device="cpu")
        stats = (ones * x.abs().max(), ones * x.square().mean(), ones * x.mean(), x)
        return Stats(*(tensor.to(device) for tensor in stats), synthetic=True)


@dataclass(frozen=True)
class Options:
    """The knobs of the steps; a recipe holds one of these."""

    oversample: int = 8  # extra columns of a randomized SVD
    power: int = 2  # its power steps
    rounds: int = 30  # at most so many alternations of branch and rounding
    gain: float = 0.004  # a round that takes less than this share off J is a lean one
    patience: int = 2  # lean rounds before stopping
    candidates: Literal["few", "usual", "many"] = "usual"  # smoothing factors that are tried
    search_rows: int = 2048  # output rows that the smoothing search looks at
    search_tokens: int = 512  # rows of the token sample that errors are measured on
    damping: float = 0.01  # of the mean diagonal of the Gram matrix, however many rows it saw
    scarcity: float = 0.2  # more damping, per channels/rows; best of 0.03 … 1 on synthetic layers


@dataclass(frozen=True)
class Context:
    """What all works of one run share."""

    scale_dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    options: Options = Options()
    log: Callable[[str], None] = lambda message: None


@dataclass
class Work:
    """Linears that read the same input, stacked along N, on their way to one site each."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    weight: Tensor  # (N,K) fp32 or 16 bit; never written to
    site: Site
    stats: Stats
    smooth: Tensor  # (K) fp32 holding 16-bit values
    up: Tensor  # (N,R) fp32
    low: Tensor  # (R,K) fp32, in smoothed space
    residual: QTensor | None = None
    errors: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(names: Sequence[str], weights: Sequence[Tensor], site: Site, stats: Stats) -> Work:
        """A fresh work: smooth = 1, no branch, no residual."""
        weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        n, k = weight.shape
        if stats.absmax.shape != (k,) or stats.tokens.shape[1] != k:
            raise NunchakuError(f"{names[0]}: statistics are of {stats.absmax.shape[0]} channels, the weight has {k}")
        for name, part in zip(names, weights, strict=True):
            if not part.sum(dtype=torch.float32).isfinite() and not part.isfinite().all():
                raise NunchakuError(f"{name}: the weight holds NaN or Inf")
        fresh = weight.new_ones(k, dtype=torch.float32)
        return Work(tuple(names), tuple(w.shape[0] for w in weights), weight, site, stats, fresh,
                    fresh.new_zeros(n, 0), fresh.new_zeros(0, k))

    def chunks(self) -> Iterator[slice]:
        """Row ranges small enough that temporaries stay far below one copy of the weight."""
        n, k = self.weight.shape
        step = max(1, CHUNK_ELEMENTS.get(self.weight.device.type, CHUNK_ELEMENTS["other"]) // k)
        return (slice(start, min(start + step, n)) for start in range(0, n, step))

    def smoothed(self, rows: slice) -> Tensor:
        """Rows of Ŵ = W·diag(smooth), a new fp32 tensor."""
        wide = self.weight[rows].to(torch.float32, copy=True)  # by itself four times as fast as within the product
        return wide.mul_(self.smooth)

    def remainder(self, rows: slice) -> Tensor:
        """Rows of R = Ŵ − up·low, a new fp32 tensor."""
        what = self.smoothed(rows)
        return what.addmm_(self.up[rows], self.low, alpha=-1) if self.low.shape[0] else what


Step = Callable[[Work, Context], None]


def stage(name: str) -> Callable[[Step], Step]:
    """Marks a step with the stage of a recipe that it belongs to."""
    def mark(step: Step) -> Step:
        step.stage = name  # type: ignore[attr-defined]
        return step
    return mark


def round16(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values that a 16-bit dtype holds exactly."""
    return x.to(dtype).float()
