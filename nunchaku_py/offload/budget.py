"""How much memory a model may take, and which of its blocks stay where that is."""
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import NunchakuError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Plan:
    """Blocks by their number: those that stay, and those that come and go by way of two buffers."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    nbytes: int  # of everything that stays, and the two buffers


def parse_size(value: int | float | str, name: str) -> int:
    """Bytes: a number of them, or a text such as "4GB" (10⁹ bytes each) or "4 GiB" (2³⁰)."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found and found[2].upper() in UNITS:
            return int(float(found[1]) * UNITS[found[2].upper()])
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return int(value)
    raise NunchakuError(f"{name}: expected a size such as '4GB', '4GiB' or a number of bytes, got {value!r}")


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


def shown(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
