import triton
import triton.language as tl
@triton.jit
def quantize_groups(v, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr):
    return v, v
