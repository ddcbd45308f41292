"""What is hooked onto modules that are offloaded."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..errors import NunchakuError

UNDO = "nq.offload(model, None) undoes it"


class NotCopied:
    """Part of an offloaded model, which has its own memory: a copy would share it."""

    def __reduce__(self) -> NoReturn:
        raise NunchakuError(f"an offloaded model is not copied or pickled, as its copy would share its memory; {UNDO}")


class Hook(NotCopied):
    """Calls function(argument) when a module is called. A compiler leaves it alone."""

    def __init__(self, function: Callable[[Any], None], argument: Any) -> None:
        self.function, self.argument = function, argument

    @torch.compiler.disable
    def __call__(self, *_: Any) -> None:
        self.function(self.argument)
