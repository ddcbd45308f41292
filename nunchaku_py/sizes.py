"""Sizes of memory as people write them. Without torch, so that a command line can be read quickly."""
from __future__ import annotations

import math
import re

from .errors import NunchakuError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(value: int | float | str, name: str) -> int:
    """Bytes: a number of them, or a text such as "4GB" (10⁹ bytes each) or "4 GiB" (2³⁰)."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found and found[2].upper() in UNITS:
            return int(float(found[1]) * UNITS[found[2].upper()])
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return int(value)
    raise NunchakuError(f"{name}: expected a size such as '4GB', '4GiB' or a number of bytes, got {value!r}")


def shown(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
