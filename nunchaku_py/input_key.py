"""What a quantized input depends on: linears with one key can share it.

Equal keys are one object, and are compared by `is`. So a compiler guards that two linears hold the same key, not what
the key says, which differs from block to block: the blocks of a model share a graph.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class InputKey:
    """Made by `input_key` only."""

    def __init__(self, token: str, digest: str) -> None:
        self.token, self.digest = token, digest

    def __reduce__(self) -> tuple:
        return input_key, (self.token, self.digest)


_known: WeakValueDictionary[tuple[str, str], InputKey] = WeakValueDictionary()


def input_key(token: str, digest: str) -> InputKey:
    """Of how an input is quantized (the token of its ActSpec), and of what with."""
    return _known.setdefault((token, digest), InputKey(token, digest))


def digest_of(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
