"""How much memory a model may take, and which of its blocks stay where that is."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import NunchakuError
from ..sizes import shown


@dataclass(frozen=True)
class Plan:
    """Blocks by their number: those that stay, and those that come and go by way of two buffers."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    nbytes: int  # of everything that stays, and the two buffers


def choose(sizes: Sequence[int], rest: int, budget: int, name: str) -> Plan:
    """As many resident blocks as fit beside `rest` and two buffers for the others. They lie evenly among the streamed
    ones: while one computes, there is more time to copy the next."""
    blocks = range(len(sizes))
    for count in range(len(sizes), -1, -1):
        for first in range(len(sizes) // count if count else 1):  # blocks may differ in size
            resident = {first + number * len(sizes) // count for number in range(count)}
            streamed = [number for number in blocks if number not in resident]
            total = rest + sum(sizes[i] for i in resident) + 2 * max((sizes[i] for i in streamed), default=0)
            if total <= budget:
                return Plan(tuple(sorted(resident)), tuple(streamed), total)
    least = rest + min(sum(sizes), 2 * max(sizes, default=0))
    raise NunchakuError(f"nq.offload: {name}={shown(budget)} is too little for this model: what lies outside its "
                        f"blocks takes {shown(rest)}, two of its blocks {shown(least - rest)}; the least that works is "
                        f"{name}='{math.ceil(least / 1e4) / 100:.2f}MB'")
