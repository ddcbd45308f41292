"""Types of command-line arguments."""
from __future__ import annotations

import argparse
from collections.abc import Callable

BACKENDS = ("cuda", "triton", "cpu", "torch")  # ops.registry.ORDER, without importing torch
LARGEST_SEED = 2**63 - 1  # of torch.Generator


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `low` on, up to `high` if given."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            upper = "" if high is None else f" up to {high}"
            raise argparse.ArgumentTypeError(f"expected a whole number from {low}{upper}, got {text!r}")
        return value

    return parse
