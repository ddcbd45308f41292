"""The calls that are compiled ahead of time: every op in what it can be asked for, for each target what runs there."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from nunchaku_py import ops
from nunchaku_py.ops import AttentionSpec

Named = tuple[str, Callable[[], object]]


def of(target: int) -> Iterator[Named]:
    yield from attention_calls(target)


# ------------------------------------------------------------------------------------------------------------ attention
def attention_calls(target: int) -> Iterator[Named]:
    """Self attention of a picture of 1024² with heads of 128 and 64 channels; cross attention to 77 keys; and one of
    everything, as sizes of 1 are constants to Triton."""
    for products in ("16bit", "fp8") if target >= 89 else ("16bit",):
        for dtype in (torch.bfloat16, torch.float16):
            yield attention_call(products, 128, 4608, dtype)
        yield attention_call(products, 64, 4096)
        yield attention_call(products, 64, 77)
        yield attention_call(products, 128, 4600)
        yield attention_call(products, 64, 1, tokens=1, heads=1)


def attention_call(products: str, dim: int, keys: int, dtype: torch.dtype = torch.bfloat16, tokens: int = 4608,
                   heads: int = 24) -> Named:
    q, k, v = (torch.empty(1, rows, heads, dim, dtype=dtype).transpose(1, 2) for rows in (tokens, keys, keys))
    spec = AttentionSpec(products)

    def run() -> object:
        with ops.backend("triton"):
            return ops.attention(q, k, v, spec)

    return f"attention: {products}, {dim} channels, {keys} keys, {str(dtype).removeprefix('torch.')}", run
