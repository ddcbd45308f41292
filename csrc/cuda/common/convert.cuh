// Conversions, to nearest even. T is bf16 or f16. In a pair, the first value is in the low half of the register.
#pragma once
#include <type_traits>

#include "cuda/common/platform.cuh"
#include "cuda/common/types.cuh"

namespace nunchaku_py::cuda {

// 1.5·2²³: of floats this large the last bits are a whole number, rounded half to even.
constexpr float WHOLE = 12582912.f;

// ---- to float -------------------------------------------------------------------------------------------------------
DEVICE float cvt_f32(int v) {
  return float(v);
}
DEVICE float cvt_f32(bf16 v) {
  return __builtin_bit_cast(float, uint32_t(v) << 16);
}
DEVICE float cvt_f32(f16 v) {
#ifndef __CUDACC__
  return simt::f16_value(uint32_t(v));
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(uint16_t(v)));
  return f;
#endif
}

// e4m3, which the oldest targets have no instruction for: its bits are those of a float whose exponent counts 120 less.
DEVICE float cvt_f32(e4m3 v) {
  const uint32_t bits = uint32_t(v), magnitude = bits & 127;
  const float value = __builtin_bit_cast(float, magnitude << 20) * 0x1p120f;
  return magnitude == 127 ? __builtin_bit_cast(float, 0x7fffffff) : bits & 128 ? -value : value;
}

template <class T>
DEVICE void cvt_f32x2(float (&to)[2], uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>) {
    to[0] = __builtin_bit_cast(float, pair << 16);
    to[1] = __builtin_bit_cast(float, pair & 0xffff0000u);
  } else {
    static_assert(std::is_same_v<T, f16>, "a pair is of bf16 or of f16");
    to[0] = cvt_f32(f16(uint16_t(pair)));
    to[1] = cvt_f32(f16(uint16_t(pair >> 16)));
  }
}

// ---- to 16 bits: beyond the largest number comes infinity, NaN is 0x7fff --------------------------------------------
DEVICE bf16 cvt_bf16(float v) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bf16(bits);
#else  // sm_75 has no such instruction either
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  return v != v ? bf16(0x7fff) : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

DEVICE f16 cvt_f16(float v) {
#ifndef __CUDACC__
  return f16(simt::f16_bits(v));
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return f16(bits);
#endif
}

DEVICE uint32_t cvt_bf16x2(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return uint32_t(cvt_bf16(low)) | uint32_t(cvt_bf16(high)) << 16;
#endif
}

DEVICE uint32_t cvt_f16x2(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return uint32_t(cvt_f16(low)) | uint32_t(cvt_f16(high)) << 16;
#endif
}

template <class T>
DEVICE T cvt_16bit(float v) {
  if constexpr (std::is_same_v<T, bf16>)
    return cvt_bf16(v);
  else
    return cvt_f16(v);
}

template <class T>
DEVICE uint32_t cvt_16bitx2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>)
    return cvt_bf16x2(low, high);
  else
    return cvt_f16x2(low, high);
}

// ---- to 4 bits ------------------------------------------------------------------------------------------------------
// Two e2m1 in a byte; beyond 6 comes 6, and so for NaN.
DEVICE uint32_t cvt_e2m1x2(float low, float high) {
#if __CUDA_ARCH_SPECIFIC__ >= 1000 || __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1000
  uint32_t pair;
  asm("{ .reg .b8 p; cvt.rn.satfinite.e2m1x2.f32 p, %1, %2; cvt.u32.u8 %0, p; }" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto one = [](float v) -> uint32_t {
    const float x = v < 0 ? -v : v;
    const uint32_t code = (x > .25f) + (x >= .75f) + (x > 1.25f) + (x >= 1.75f) + (x > 2.5f) + (x >= 3.5f) + (x > 5.f);
    return v != v ? 7 : code | (__builtin_bit_cast(uint32_t, v) >> 28 & 8);
  };
  return one(low) | one(high) << 4;
#endif
}

// ---- to 8 bits ------------------------------------------------------------------------------------------------------
// e4m3; beyond 448 comes 448, and NaN is 0x7f.
DEVICE e4m3 cvt_e4m3(float v) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(v));
  return e4m3(pair & 0xff);
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, v), sign = bits >> 24 & 128;
  const float magnitude = v < 0 ? -v : v;
  if (v != v) return e4m3(0x7f);
  if (magnitude >= 448) return e4m3(sign | 0x7e);
  if (magnitude < 0x1p-6f)  // subnormal: added to 2¹⁴, whose last place is 2⁻⁹, it is rounded by the addition
    return e4m3(sign | (__builtin_bit_cast(uint32_t, magnitude + 0x1p14f) - 0x46800000));
  const uint32_t nearest = (bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1);
  return e4m3(sign | ((nearest >> 20) - (120 << 3)));
#endif
}

// ---- bytes ----------------------------------------------------------------------------------------------------------
// Four bytes of the eight of {b, a}: nibble i of `which` says which one becomes byte i, 0 being the lowest of a.
DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t which) {
#ifndef __CUDACC__
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t taken = 0;
  for (int i = 0; i < 4; ++i) taken |= uint32_t(bytes >> (which >> i * 4 & 7) * 8 & 255) << i * 8;
  return taken;
#else
  uint32_t taken;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(taken) : "r"(a), "r"(b), "r"(which & 0x7777));
  return taken;
#endif
}

}  // namespace nunchaku_py::cuda
