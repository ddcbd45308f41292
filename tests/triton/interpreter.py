"""What Triton's interpreter gets wrong or cannot do, and GPUs do: it cuts float32 off to bfloat16 and e4m3 instead of
rounding, multiplies the bits of bfloat16 as if they were whole numbers, rounds a fused multiplication and addition
twice, and has no products of NVFP4."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
_fp_to_fp = InterpreterBuilder.create_fp_to_fp
_cast, _dot, _dot_scaled = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, TritonSemantic.dot_scaled


def teach() -> None:
    InterpreterBuilder.cast_impl = cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    InterpreterBuilder.create_fma = fma
    InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot = fp_to_fp, dot
    InterpreterBuilder.create_dot_scaled = dot_scaled
    TritonSemantic.dot_scaled = named_formats


def widened(data: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrowed(data: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 nearest to float32, half to even."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def cast(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    of, to = src.dtype.scalar, dst_type.scalar
    if (of, to) == (tl.bfloat16, tl.float32):
        return TensorHandle(widened(src.data), to)
    if (of, to) == (tl.float32, tl.bfloat16):
        return TensorHandle(narrowed(src.data), to)
    return _cast(self, src, dst_type)


def fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x·y + z; the product of two float32 is exact in what numpy has that is longer."""
    wide = x.data.astype(np.longdouble) * y.data.astype(np.longdouble) + z.data.astype(np.longdouble)
    return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def fp_to_fp(self: InterpreterBuilder, src: TensorHandle, dst_type: Any, *rest: Any) -> TensorHandle:
    """To e4m3 half to even; what is larger than 448 becomes that, as by cvt.satfinite."""
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
        return _fp_to_fp(self, src, dst_type, *rest)
    near = torch.from_numpy(np.ascontiguousarray(src.data)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return TensorHandle(near.view(torch.uint8).numpy(), dst_type.scalar)


def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
    values = {tl.bfloat16: widened, tl.float8e4nv: _e4m3}.get(a.dtype.scalar)
    if values is None:
        return _dot(self, a, b, d, *rest)
    return TensorHandle(np.matmul(values(a.data), values(b.data)) + d.data, d.dtype.scalar)


def named_formats(self: TritonSemantic, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *rest: Any) -> Any:
    """Names come as they are where nothing is compiled."""
    left, right = (f if isinstance(f, tl.constexpr) else tl.constexpr(f) for f in (lhs_format, rhs_format))
    return _dot_scaled(self, lhs, lhs_scale, left, rhs, rhs_scale, right, *rest)


def dot_scaled(self: InterpreterBuilder, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_packed, b_packed,
               acc) -> TensorHandle:
    """acc + a·b of (m, k/2) and (k/2, n) bytes of two codes, the first in the low nibble, and scales (·, k/16)."""
    return TensorHandle(np.matmul(_values(a.data, a_scale), _values(b.data.T, b_scale).T) + acc.data, acc.dtype.scalar)


def _values(packed: np.ndarray, scales: TensorHandle) -> np.ndarray:
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    signless = np.ascontiguousarray(scales.data).view(np.uint8) & 0x7F  # at their signs the instruction does not look
    return E2M1[codes] * np.repeat(_e4m3(signless), 16, axis=1)


def _e4m3(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
