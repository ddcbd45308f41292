"""Weights that stay on the host while their model is on a GPU, and visit it for the calls that need them."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_away(site: Any, device: torch.device) -> bool:
    """Whether the site's weights are on the host and its input is not."""
    return site.codes.device.type == "cpu" and device.type not in ("cpu", "meta")


@contextmanager
def visiting(site: Any, device: torch.device) -> Iterator[None]:
    """Within it the tensors of a site that is away are on `device`; afterwards those of the host are in their place."""
    if not is_away(site, device):
        yield
        return
    homes = [(tensor, tensor.data) for tensor in _tensors(site)]
    try:
        for tensor, data in homes:
            tensor.data = fetch(data, device)
        yield
    finally:
        for tensor, data in homes:
            tensor.data = data


def fetch(data: Tensor, device: torch.device) -> Tensor:
    return data.to(device, non_blocking=True)


def send_home(site: Any, device: torch.device) -> None:
    """Put the tensors of a site on `device` for good."""
    for tensor in _tensors(site):
        tensor.data = tensor.data.to(device)


def _tensors(site: Any) -> list[Tensor]:
    return [tensor for tensor in (*site._parameters.values(), *site._buffers.values()) if tensor is not None]
