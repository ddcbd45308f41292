"""The calls that are compiled ahead of time: every op in what it can be asked for, for each target in what runs there."""
from __future__ import annotations

from collections.abc import Callable, Iterator


def of(target: int) -> Iterator[tuple[str, Callable[[], object]]]:
    yield from ()
