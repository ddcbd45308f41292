import triton
import triton.language as tl


@triton.jit
def quantize_groups(v, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr):
    BM: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    g = tl.reshape(v, (BM, BK // GROUP, GROUP))
    s = tl.max(tl.abs(g), 2) / 7.0
    q = tl.reshape(g / tl.expand_dims(s, 2), (BM, BK // 2, 2)).to(tl.uint8)
    a, b = tl.split(q)
    if FORMAT == "nvfp4":
        return (a & 15) | (b << 4), s.to(tl.uint8)
    else:
        return (a & 15) | (b << 4), s.to(SCALE)
