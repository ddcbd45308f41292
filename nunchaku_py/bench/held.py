"""The bytes that a model's tensors take: ours, 16 bit, and the tensor subclasses and tables of other packages."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

PAGE = 4096


def held_bytes(model: nn.Module) -> int:
    """What the model occupies in memory: its weights as they lie there, and what is derived from them for its mode."""
    held = {tensor.data_ptr(): tensor for tensor in tensors_of(model)}
    return sum(tensor.nbytes for tensor in held.values())


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every plain tensor; bitsandbytes keeps scales beside the weight, in its `quant_state`."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from plain_tensors(tensor)
        yield from _state_of(getattr(tensor, "quant_state", None))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Those inside a tensor subclass; or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(tensor, name), Tensor):
            yield from plain_tensors(inner)


def read_all(model: nn.Module) -> None:
    """Touch every page: of a mapped file else only a part would be in memory, and loading it would seem free."""
    for tensor in tensors_of(model):
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.flatten().view(torch.uint8)[::PAGE].amax()


def _state_of(state: object) -> Iterator[Tensor]:
    if state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        yield from _state_of(getattr(state, "state2", None))
