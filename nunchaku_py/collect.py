"""Statistics of the inputs of quantized sites, taken while calibration forwards run through them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import NunchakuError
from .methods.work import Stats
from .precision import without_autocast

CHUNK_ELEMENTS = 1 << 24  # 64 MB of fp32 temporaries at a time, whatever the number of tokens
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly: each call samples other positions


@dataclass(frozen=True)
class SiteTap:
    """Where to listen: the input of `module` (nn.Linear or 1×1 nn.Conv2d), of which `columns` = (k0, k1) or all K.

    Modules that share an input need one tap, on the first of them. `gram` asks for E[xxᵀ] (K, K) as well.
    """

    module: nn.Module
    columns: tuple[int, int] | None = None
    gram: bool = False


class Collector:
    """Adds up x (M, K) over calls: absmax, E[x²], E[x], optionally E[xxᵀ], and an evenly strided sample of rows."""

    def __init__(self, name: str, tap: SiteTap, calls: int, sample: int) -> None:
        self.name, self.tap, self.sample = name, tap, sample
        self.rows_per_call = -(-sample // max(calls, 1))
        self.rows, self.calls, self.sampled = 0, 0, []
        self.absmax = self.total = self.squares = self.gram = None

    def add(self, value: torch.Tensor) -> None:
        """value: (..., K), or (..., K, H, W) for a convolution."""
        x = self._matrix(value.detach())
        if self.absmax is None:
            self._allocate(x)
        self._sample(x)
        step = max(1, CHUNK_ELEMENTS // x.shape[1])
        with without_autocast(x.device.type):
            for start in range(0, x.shape[0], step):
                self._add_chunk(x[start : start + step].float())

    def take(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The input out of the arguments of a call of the module."""
        self.add(args[0] if args else next(iter(kwargs.values())))

    def stats(self) -> Stats:
        if not torch.isfinite(self.absmax).all():
            bad = int((~torch.isfinite(self.absmax)).sum())
            raise NunchakuError(
                f"{self.name}: the calibration input holds NaN or Inf in {bad} of its {len(self.absmax)} channels"
            )
        tokens = torch.cat(self.sampled)
        return Stats(
            absmax=self.absmax,
            second=(self.squares / self.rows).float(),
            mean=(self.total / self.rows).float(),
            tokens=tokens[_evenly(len(tokens), self.sample, 0.0, tokens.device)],
            gram=None if self.gram is None else self.gram / self.rows,
            rows=self.rows,
        )

    def _matrix(self, value: torch.Tensor) -> torch.Tensor:
        x = value.movedim(-3, -1) if isinstance(self.tap.module, nn.Conv2d) else value
        x = x.reshape(-1, x.shape[-1])
        if self.tap.columns is None:
            return x
        first, last = self.tap.columns
        if not 0 <= first < last <= x.shape[1]:
            raise NunchakuError(f"{self.name}: columns {first}:{last} do not lie within an input of {x.shape[1]}")
        return x[:, first:last]

    def _allocate(self, x: torch.Tensor) -> None:
        k = x.shape[1]
        # Apple GPUs know no fp64; elsewhere it keeps a sum over a million rows as exact as its terms.
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        self.absmax = x.new_zeros(k, dtype=torch.float32)
        self.total, self.squares = x.new_zeros(k, dtype=wide), x.new_zeros(k, dtype=wide)
        self.gram = x.new_zeros(k, k, dtype=torch.float32) if self.tap.gram else None

    def _sample(self, x: torch.Tensor) -> None:
        phase = (self.calls * GOLDEN) % 1.0
        self.sampled.append(x[_evenly(x.shape[0], self.rows_per_call, phase, x.device)])
        self.calls += 1
        self.rows += x.shape[0]

    def _add_chunk(self, x: torch.Tensor) -> None:
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))  # both hand NaN on
        self.total += x.sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        self.squares += x.square().sum(0)


def _evenly(rows: int, wanted: int, phase: float, device: torch.device) -> torch.Tensor:
    """Indices of one row in each of `wanted` equal stretches of `rows`, `phase` in [0, 1) of the way through it."""
    count = min(rows, wanted)
    return ((torch.arange(count, dtype=torch.float64) + phase) * rows / max(count, 1)).long().to(device)


@contextmanager
def tapped(collectors: Iterable[Collector], before_each: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it every call of a tapped module adds its input to its collector, after `before_each()`."""

    def listen(collector: Collector) -> RemovableHandle:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            before_each()
            collector.take(args, kwargs)

        return collector.tap.module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [listen(collector) for collector in collectors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
