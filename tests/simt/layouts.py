"""How scales lie on the device (csrc/cuda/common/scales.h)."""
from torch import Tensor

from nunchaku_py.layout import Layout

BLOCK = 64
_TOKENS = Layout("(M m:4 i:2 g:8) (G) -> G M g m i")
_CHANNELS = Layout("(N n:8 t:4 e:2) (G) -> G N t n e")


def of_tokens(scales: Tensor) -> Tensor:
    return _TOKENS.pack(_TOKENS.pad(scales))


def of_channels(scales: Tensor) -> Tensor:
    return _CHANNELS.pack(_CHANNELS.pad(scales))


def empty_of_tokens(rows: int, like: Tensor, k: int) -> Tensor:
    """Where a kernel puts the scales of an activation (rows, k): NaN."""
    return like.new_full((k // BLOCK, -(-rows // BLOCK) * BLOCK), float("nan"))


def tokens_in_rows(stored: Tensor, rows: int) -> Tensor:
    """(rows, G) of what a kernel put there."""
    return _TOKENS.unpack(stored.reshape(-1), (rows, stored.shape[0]))
