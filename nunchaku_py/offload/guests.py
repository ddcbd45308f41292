"""What a pipeline has beside its denoiser, on the device only while it is needed: text encoders from their first call
to the first call of the denoiser, a VAE while it encodes or decodes. Where both do not fit the denoiser makes room."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..checkpoint.mapping import release
from .hook import Hook, NotCopied
from .paging import Paging
from .streaming import CPU, Streaming

ENCODERS = ("text_encoder", "image_encoder")  # so do their names begin
VAES = ("vae", "vqvae", "movq", "vqgan")
ENTRANCES = ("encode", "decode")


class Guests(NotCopied):
    """They are called to where denoisers are streamed to, and everything else stays there. Beside denoisers whose pages
    are mapped all stay where they are, and of text encoders that are mapped the pages are dropped."""

    def __init__(self, pipe: Any, denoisers: Sequence[Streaming | Paging]) -> None:
        self.device = device = denoisers[0].device
        self.denoisers = denoisers
        models = [denoiser.model for denoiser in denoisers]
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)
                 and not any(part is model for model in models)}
        self.encoders = [part for name, part in parts.items() if name.startswith(ENCODERS)]
        self.vaes = [part for name, part in parts.items() if name in VAES]
        self.homes = [(part, device_of(part)) for part in parts.values()]
        self.handles = [denoiser.model.register_forward_pre_hook(Hook(self._leave, denoiser), prepend=True)
                        for denoiser in denoisers]
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
        if device_of(part) == self.device != CPU:
            return
        wanted = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        taken = sum(denoiser.plan.nbytes for denoiser in self.denoisers)
        if wanted + taken > sum(denoiser.budget for denoiser in self.denoisers):
            for denoiser in self.denoisers:
                denoiser.make_room()
        part.to(self.device)

    def _leave(self, denoiser: Streaming | Paging) -> None:
        """A denoiser is called: there is nothing left to encode."""
        for part in self.encoders:
            if self.device is None:
                release(part.parameters())
            elif device_of(part) == self.device != CPU:
                part.to(CPU)
        if self.device is not None:
            denoiser.come_back()

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
