"""How the rows of a packed linear stand for those of diffusers' modules."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import Stored
from .layouts import CHANNELS, whole
from .linears import Linear

HEAD = 32  # of SANA's attention


@dataclass(frozen=True)
class Arrangement:
    """sizes: rows of each module."""

    stored: Stored
    sizes: tuple[int, ...]

    @property
    def heads(self) -> bool:
        return self.stored.rows == "heads"

    @property
    def total(self) -> int:
        """Rows in the file, before padding."""
        return sum(whole(size, CHANNELS) for size in self.sizes) if self.heads else sum(self.sizes)

    def apart(self, linear: Linear) -> list[Linear]:
        """One linear for each module; no two hold the same tensor."""
        starts = [sum(self._places[:i]) for i in range(len(self.sizes))]
        in_order = linear.of_rows(self._in_order)
        found = [in_order.of_rows(lambda rows, a=start, b=start + size: rows[a:b].clone())
                 for start, size in zip(starts, self.sizes, strict=True)]
        for other in found[1:]:
            for name in SHARED:
                tensor = getattr(other, name)
                setattr(other, name, None if tensor is None else tensor.clone())
        return found

    def joined(self, linears: Sequence[Linear]) -> Linear:
        """The linear of the file; what all modules have alike is the first one's."""
        parts = {name: [getattr(linear, name) for linear in linears] for name in _BY_ROWS}
        found = {name: self._as_stored(self._cat(tensors, _FILL.get(name, 0)))
                 for name, tensors in parts.items() if tensors[0] is not None}
        return Linear(**{**vars(linears[0]), **found})

    @property
    def _places(self) -> list[int]:
        return [whole(size, CHANNELS) if self.heads else size for size in self.sizes]

    def _cat(self, tensors: Sequence[Tensor], fill: int) -> Tensor:
        return torch.cat([_grown(tensor, place, fill) for tensor, place in zip(tensors, self._places, strict=True)])

    def _in_order(self, rows: Tensor) -> Tensor:
        if self.heads:
            q, kv = rows.split([self._places[0], rows.shape[0] - self._places[0]])
            k, v = kv.unflatten(0, (-1, 2, HEAD)).unbind(1)
            return torch.cat((q, k.flatten(0, 1), v.flatten(0, 1)))
        return apart(rows, self._spread) if self._spread else rows

    def _as_stored(self, rows: Tensor) -> Tensor:
        if self.heads:
            q, k, v = (part.unflatten(0, (-1, HEAD)) for part in rows.split(self._places))
            return torch.cat((q.flatten(0, 1), torch.stack((k, v), 1).flatten(0, 2)))
        return together(rows, self._spread) if self._spread else rows

    @property
    def _spread(self) -> int:
        return 2 if self.stored.rows == "paired" else self.stored.spread


SHARED = ("smooth", "down", "divisor")  # what all modules have alike
_BY_ROWS = ("codes", "scales", "zeros", "channel_scale", "up", "bias")
_FILL = {"scales": 1, "channel_scale": 1}


def apart(rows: Tensor, spread: int) -> Tensor:
    """Row c·S + s → row s·(N/S) + c: what stands together for every channel, one kind after the other."""
    return rows.unflatten(0, (-1, spread)).transpose(0, 1).flatten(0, 1)


def together(rows: Tensor, spread: int) -> Tensor:
    """The inverse."""
    return rows.unflatten(0, (spread, -1)).transpose(0, 1).flatten(0, 1)


def _grown(rows: Tensor, size: int, fill: int) -> Tensor:
    if rows.shape[0] == size:
        return rows
    missing = torch.full((size - rows.shape[0], *rows.shape[1:]), fill, device=rows.device).to(rows.dtype)
    return torch.cat((rows, missing))
