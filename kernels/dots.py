"""Products of tiles. Triton's interpreter multiplies the bits of bfloat16, and no NVFP4: it gets their values."""
import triton
import triton.language as tl

from .decode import e2m1, e4m3, in_order, over_groups

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot16(a, b, acc):
    """acc (fp32) + a·b of 16-bit tiles."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_nvfp4(a, a_scales, b, b_scales, acc):
    """acc (fp32) + a·bᵀ of tiles (rows, k/2) of two codes a byte, and (rows, k/16) of the bits of e4m3 scales."""
    if INTERPRETED:
        wide = e2m1(in_order(a, False)) * over_groups(e4m3(a_scales), 16)
        other = e2m1(in_order(b, False)) * over_groups(e4m3(b_scales), 16)
        return tl.dot(wide, tl.trans(other), acc)
    else:
        return tl.dot_scaled(a, a_scales.to(tl.float8e4nv, bitcast=True), "e2m1",
                             tl.trans(b), b_scales.to(tl.float8e4nv, bitcast=True), "e2m1", acc)
