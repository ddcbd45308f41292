"""What a pipeline has beside its denoiser, on the device only while it is needed: text encoders from their first call
to the first call of the denoiser, a VAE while it encodes or decodes."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..checkpoint.mapping import release
from .hook import Hook, NotCopied

ENCODERS = ("text_encoder", "image_encoder")  # so do their names begin
VAES = ("vae", "vqvae", "movq", "vqgan")
ENTRANCES = ("encode", "decode")
CPU = torch.device("cpu")


class Guests(NotCopied):
    """device: where they are called to, and where everything else stays; None: all stay where they are, and of mapped
    text encoders the pages are dropped."""

    def __init__(self, pipe: Any, denoisers: Sequence[nn.Module], device: torch.device | None) -> None:
        self.device = device
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)
                 and not any(part is denoiser for denoiser in denoisers)}
        self.encoders = [part for name, part in parts.items() if name.startswith(ENCODERS)]
        self.vaes = [part for name, part in parts.items() if name in VAES]
        self.homes = [(part, device_of(part)) for part in parts.values()]
        self.handles = [part.register_forward_pre_hook(Hook(self._leave, None), prepend=True) for part in denoisers]
        if device is None:
            return
        guests = [*self.encoders, *self.vaes]
        for part in parts.values():
            part.to(CPU if any(part is guest for guest in guests) else device)
        for part in self.encoders:
            self.handles.append(part.register_forward_pre_hook(Hook(self._come, part), prepend=True))
        for part, name in self._entrances():
            vars(part)[name] = self._there(part, getattr(part, name))

    def _come(self, part: nn.Module) -> None:
        if device_of(part) != self.device:
            part.to(self.device)

    def _leave(self, _: None) -> None:
        """The denoiser is called: there is nothing left to encode."""
        for part in self.encoders:
            if self.device is None:
                release(part.parameters())
            elif device_of(part) == self.device != CPU:
                part.to(CPU)

    def _entrances(self) -> list[tuple[nn.Module, str]]:
        return [(part, name) for part in self.vaes for name in ENTRANCES if callable(getattr(part, name, None))]

    def _there(self, part: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """A method of a VAE that brings it and takes it away again."""
        @wraps(function)
        def method(*args: Any, **kwargs: Any) -> Any:
            self._come(part)
            try:
                return function(*args, **kwargs)
            finally:
                part.to(CPU)

        return method

    def undo(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        for part, name in self._entrances() if self.device is not None else ():
            vars(part).pop(name, None)
        for part, home in self.homes:
            part.to(home)


def device_of(part: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*part.parameters(), *part.buffers())), CPU)
