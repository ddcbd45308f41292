"""linear_w4a16: 4-bit weights decoded to 16 bit as they are read, times 16-bit rows. Made for few rows, where reading
the weight is all the time there is: a tile of sixteen rows is the narrowest that tensor cores take.
"""
import triton
import triton.language as tl

from .config import Choices, Config
from .costs import linear_alike, linear_cost
from .decode import group_numbers, weights

CHOICES = Choices("linear_w4a16", (
    Config(128, 128, 64, 8, 3), Config(64, 128, 64, 8, 3), Config(64, 64, 64, 4, 4), Config(32, 64, 128, 4, 3),
    Config(16, 64, 128, 4, 4), Config(16, 32, 128, 4, 4), Config(16, 128, 64, 4, 4), Config(16, 16, 256, 4, 3),
), linear_cost, linear_alike)


@triton.jit
def accumulate(qx, qw, sw, aux, rows, channels, K, HALF_K, GROUPS, EVEN: tl.constexpr,
               WEIGHT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(BN,BM) fp32: Σ_k w·x̂, w rounded to the type of x̂."""
    k, byte = tl.arange(0, BK), tl.arange(0, BK // 2)
    x = qx + rows[None, :].to(tl.int64) * K + k[:, None]
    w = qw + channels[:, None].to(tl.int64) * HALF_K + byte[None, :]
    groups = channels.to(tl.int64) * GROUPS
    channel = tl.load(aux + channels)[:, None] if WEIGHT == "nvfp4" else 0.0
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            b, values = tl.load(w), tl.load(x)
        else:
            b = tl.load(w, mask=(start // 2 + byte < HALF_K)[None, :], other=0)
            values = tl.load(x, mask=(start + k < K)[:, None], other=0)
        scales = group_numbers(sw + groups, start, K, GROUP, BK, WEIGHT == "nvfp4")
        zeros = group_numbers(aux + groups, start, K, GROUP, BK, False) if WEIGHT == "uint4" else 0.0
        acc = tl.dot(weights(b, scales, zeros, channel, WEIGHT).to(values.dtype), values, acc)
        x += BK
        w += BK // 2
    return acc
