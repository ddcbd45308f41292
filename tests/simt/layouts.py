"""How scales lie on the device (csrc/cuda/common/scales.h)."""
from torch import Tensor

from nunchaku_py.backends.cuda import packed_scales
from nunchaku_py.layout import Layout
from nunchaku_py.ops.spec import padded_rows

GROUP = 64
_TOKENS = Layout("(M m:4 i:2 g:8) (G) -> G M g m i")


def of_tokens(scales: Tensor) -> Tensor:
    padded = _TOKENS.pad(scales)
    return _TOKENS.pack(padded).view(padded.shape[1], padded.shape[0])


def of_channels(scales: Tensor) -> Tensor:
    return packed_scales(scales, scales.dtype)


def empty_of_tokens(rows: int, like: Tensor, k: int) -> Tensor:
    """Where a kernel puts the scales of an activation (rows, k): NaN."""
    return like.new_full((k // GROUP, padded_rows(rows)), float("nan"))


def tokens_in_rows(stored: Tensor, rows: int) -> Tensor:
    """(rows, G) of what a kernel put there."""
    return _TOKENS.unpack(stored.reshape(-1), (rows, stored.shape[0]))
