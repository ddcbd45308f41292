"""The one form every LoRA is read to, and what a reader knows of the model it is for."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

_SHOWN = 3


@dataclass(frozen=True)
class Delta:
    """What one module is changed by: strength · (alpha/r) · up·down, with bias added times strength·alpha/r.

    down (r, K) and up (N, r) for linears, (r, C, kh, kw) and (N, r, 1, 1) for convolutions, with the file's bits (fp8
    becomes bf16, which holds every value of it); alpha is the file's, or r where it says none.
    """

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None  # (N)
    magnitude: Tensor | None = None  # (N), DoRA: the norms that the rows of the changed weight have

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Target:
    """One model of a pipeline: its class name, and module name → weight shape of every nn.Linear and nn.Conv2d."""

    cls: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reading:
    """format is for people; deltas are component → module → Delta; unread are keys that no module was found for."""

    format: str
    deltas: dict[str, dict[str, Delta]]
    unread: list[str]
    notes: list[str]


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f", … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
