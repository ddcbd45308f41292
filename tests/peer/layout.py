"""Tensors of Nunchaku's files put in order by the formulas of the format's description, element by element.

Every function takes rows already padded and says, for each element, where in the file it stands. Nothing here comes
from the package that is tested: two writings of one format that agree are worth more than one that agrees with itself.
"""
from __future__ import annotations

import torch
from torch import Tensor


def _grid(*sizes: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")


def _scattered(values: Tensor, idx: Tensor) -> Tensor:
    """out[idx] = value, flat; every place is written once."""
    assert torch.equal(idx.flatten().sort().values, torch.arange(values.numel())), "the formula is no permutation"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()]
    out = torch.empty(values.numel(), dtype=bits)
    out[idx.flatten()] = values.contiguous().view(bits).flatten()
    return out.view(values.dtype)


def padded(x: Tensor, *shape: int, fill: float = 0) -> Tensor:
    out = torch.full(shape, fill, dtype=torch.float32).to(x.dtype)
    out[tuple(slice(0, size) for size in x.shape)] = x
    return out


def whole(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def weight(codes: Tensor) -> Tensor:
    """qweight int8 (N, K/2) of codes 0 … 15 (N, K)."""
    rows, columns = codes.shape
    n, k = _grid(rows, columns)
    nt, np, ns, nl = n // 128, (n % 128) // 16, (n % 16) // 8, n % 8
    kt, ks, kl, e = k // 64, (k % 64) // 32, (k % 32) // 8, k % 8
    word = (((((nt * (columns // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 2 + ns) * 2 + ks
    byte = 4 * word + e // 2
    out = torch.zeros(rows * columns // 2, dtype=torch.uint8)
    for half in (0, 1):  # even e in the low nibble
        chosen = e % 2 == half
        out[byte[chosen]] |= codes[chosen].to(torch.uint8) << (4 * half)
    return out.view(torch.int8).view(rows, columns // 2)


def scales(rows: Tensor) -> Tensor:
    """wscales (G, N) of INT4's scales (N, G)."""
    n, g = _grid(*rows.shape)
    count, r = rows.shape[1], n % 128
    idx = ((((n // 128 * count + g) * 8 + r // 16) * 4 + (r % 8) // 2) * 2 + (r % 16) // 8) * 2 + r % 2
    return _scattered(rows, idx).view(rows.shape[1], rows.shape[0])


def vector(values: Tensor) -> Tensor:
    """bias, smooth, wcscales: a number for each channel."""
    return scales(values[:, None]).flatten()


def micro_scales(rows: Tensor) -> Tensor:
    """wscales (G, N) float8 of NVFP4's scales (N, G); G a multiple of 4."""
    n, g = _grid(*rows.shape)
    r = n % 128
    p, q, lane, kt, s = r // 32, (r % 32) // 8, r % 8, g // 4, g % 4
    idx = ((((n // 128 * (rows.shape[1] // 4) + kt) * 8 + lane) * 4 + q) * 4 + p) * 4 + s
    return _scattered(rows, idx).view(rows.shape[1], rows.shape[0])


def _branch(values: Tensor, a: Tensor, b: Tensor, cp: Tensor, rp: Tensor, ranks: int) -> Tensor:
    np, nl, kp, kl, e = a // 8, a % 8, b // 8, (b % 8) // 2, b % 2
    idx = (((((cp * (ranks // 16) + rp) * 8 + nl) * 4 + kl) * 2 + np) * 2 + kp) * 2 + e
    return _scattered(values, idx)


def down(rows: Tensor) -> Tensor:
    """lora_down (K, R) of A (R, K)."""
    r, c = _grid(*rows.shape)
    return _branch(rows, r % 16, c % 16, c // 16, r // 16, rows.shape[0]).view(rows.shape[1], rows.shape[0])


def up(rows: Tensor) -> Tensor:
    """lora_up (N, R) of B (N, R)."""
    c, r = _grid(*rows.shape)
    return _branch(rows, c % 16, r % 16, c // 16, r // 16, rows.shape[1]).view(rows.shape)


def awq(codes: Tensor) -> Tensor:
    """qweight int16 (N/4, K) of codes 0 … 15 (N, K); modulations hold the same bytes as int32 (N/4, K/2)."""
    n, k = _grid(*codes.shape)
    row, col, nib = n // 4, (k // 64) * 64 + (n % 4) * 16 + ((k % 64) // 32) * 8 + k % 8, (k % 32) // 8
    out = torch.zeros(codes.shape[0] // 4, codes.shape[1], dtype=torch.int32)
    for place in range(4):
        chosen = nib == place
        out[row[chosen], col[chosen]] |= codes[chosen].to(torch.int32) << (4 * place)
    return torch.where(out >= 2**15, out - 2**16, out).to(torch.int16)


def awq_scales(rows: Tensor, multiple: int) -> Tensor:
    """scales or zeros (G padded with zeros, N) of (N, G)."""
    return padded(rows.T, whole(rows.shape[1], multiple), rows.shape[0])


# ---------------------------------------------------------------------------------------------------------------- rows
def spread(rows: Tensor, kinds: int) -> Tensor:
    """Stored row c·S + s is row s·(N/S) + c."""
    each = rows.shape[0] // kinds
    return rows[torch.tensor([s * each + c for c in range(each) for s in range(kinds)])]


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SANA's: the rows of q, then for each head of 32 those of k and those of v."""
    parts = [q]
    for start in range(0, k.shape[0], 32):
        parts += [k[start:start + 32], v[start:start + 32]]
    return torch.cat(parts)
