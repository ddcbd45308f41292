"""What follows a product before it reaches memory: y is a tile (BM,BN) fp32 of rows and columns of the result."""
import triton
import triton.language as tl

from .numbers import quantize_groups


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu_tanh":  # ½·y·(1 + tanh u) = y/(1 + e^(−2u))
        return y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    else:
        return y


@triton.jit
def channels_of(block, half, GLU: tl.constexpr, GATE_FIRST: tl.constexpr, BN: tl.constexpr):
    """(output channels of a tile, columns of the result in which they end). A value and its gate are neighbours in the
    tile, wherever they are in the weight; their column is one."""
    place = tl.arange(0, BN)
    if GLU:
        column = block * (BN // 2) + place // 2
        second = 1 - place % 2 if GATE_FIRST else place % 2
        return column + second * half, column
    else:
        return block * BN + place, block * BN + place


@triton.jit
def store(y, out, rows, columns, M, N):
    at = out + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def gated(y, gate, residual, rows, columns, M, N, rows_each):
    """residual + gate·y; the rows of a sample, so many, share a gate."""
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    factor = tl.load(gate + (rows // rows_each)[:, None].to(tl.int64) * N + columns[None, :], mask=inside, other=0)
    base = tl.load(residual + rows[:, None].to(tl.int64) * N + columns[None, :], mask=inside, other=0)
    return base.to(tl.float32) + y * factor.to(tl.float32)


@triton.jit
def rotated(y, q_norm, k_norm, rotary, rows, columns, width, tokens, eps, D: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr):
    """RMSNorm of each head of q and k, then its pairs turned; v as it is. Heads do not straddle tiles."""
    part, of_head = columns // width, columns % D
    heads = tl.reshape(y, (BM, BN // D, D))
    scale = tl.rsqrt(tl.sum(heads * heads, 2) / D + eps)
    normed = tl.reshape(heads * tl.expand_dims(scale, 2), (BM, BN))
    weight = tl.where(part == 0, tl.load(q_norm + of_head), tl.load(k_norm + of_head))
    even, odd = tl.split(tl.reshape(normed * weight[None, :], (BM, BN // 2, 2)))
    pair = tl.arange(0, BN // 2) % (D // 2)  # a tile begins with a head
    at = rotary + (rows % tokens)[:, None] * D + pair[None, :] * 2
    cos, sin = tl.load(at), tl.load(at + 1)
    turned = tl.interleave(even * cos - odd * sin, even * sin + odd * cos)
    return tl.where((part == 2)[None, :], y, turned)


@triton.jit
def store_parts(y, out, rows, columns, M, width):
    """q, k and v one after the other, each (M, width)."""
    part, column = columns // width, columns % width
    at = out + (part[None, :].to(tl.int64) * M + rows[:, None]) * width + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (part < 3)[None, :])


@triton.jit
def quantized(z, inv_smooth, down, codes, scales, hidden, rows, columns, block, M, N, GROUPS, R, shift,
              FORMAT: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, BR: tl.constexpr):
    """z (BM,W), in its 16-bit type, as the next linear takes it; of h what these columns give, which is added later."""
    smooth = tl.load(inv_smooth + columns, mask=columns < N, other=0)
    packed, scale = quantize_groups((z.to(tl.float32) + shift) * smooth[None, :], FORMAT, GROUP, z.dtype)
    first = tl.min(columns, 0)
    byte, group = first // 2 + tl.arange(0, W // 2), first // GROUP + tl.arange(0, W // GROUP)
    inside, wide = (rows < M)[:, None], rows[:, None].to(tl.int64)
    tl.store(codes + wide * (N // 2) + byte[None, :], packed, mask=inside & (byte * 2 < N)[None, :])
    tl.store(scales + wide * GROUPS + group[None, :], scale, mask=inside & (group < GROUPS)[None, :])
    for start in range(0, R, BR):
        rank = start + tl.arange(0, BR)
        part = tl.load(down + rank[None, :] * N + columns[:, None], mask=(rank < R)[None, :] & (columns < N)[:, None],
                       other=0)
        sums = tl.dot(z, part, tl.zeros((z.shape[0], BR), tl.float32))
        at = hidden + (block.to(tl.int64) * M + wide) * R + rank[None, :]
        tl.store(at, sums, mask=inside & (rank < R)[None, :])
