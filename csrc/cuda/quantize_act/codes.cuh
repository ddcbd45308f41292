// INT4 codes and their scale, of values that neighbouring threads hold: what every kernel that quantizes shares.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/warp.cuh"

namespace nunchaku_py::cuda {

// The largest magnitude (unsigned: the largest value) that LANES neighbouring threads hold; NaN if one is not finite.
template <int LANES, int OWN>
DEVICE float group_top(const float (&x)[OWN], bool is_unsigned) {
  float top = 0, finite = 0;  // finite: 0, or NaN
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    top = fmaxf(top, is_unsigned ? x[i] : fabsf(x[i]));
    finite += x[i] - x[i];
  }
#pragma unroll
  for (int lanes = 1; lanes < LANES; lanes *= 2) {
    top = fmaxf(top, shfl_xor(top, lanes));
    finite += shfl_xor(finite, lanes);
  }
  return top + finite;
}

// The scale in its stored type; one too large becomes the largest that is finite.
template <class T>
DEVICE T round_scale(float scale) {
  constexpr float LARGEST = std::is_same_v<T, bf16> ? 0x1.fep127f : 65504.f;
  return cvt_16bit<T>(scale > LARGEST ? LARGEST : scale);
}

// Four bits each, the first lowest; zero where the scale is zero or NaN. The last bits of v + WHOLE are v rounded, in
// two's complement.
template <int COUNT>
DEVICE uint32_t codes_of(const float (&x)[COUNT], float scale, bool is_unsigned, int first = 0) {
  static_assert(COUNT % 4 == 0);
  constexpr int TAKEN = COUNT < 8 ? COUNT : 8;
  const float lowest = is_unsigned ? 0.f : -7.f, top = is_unsigned ? 15.f : 7.f;
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < TAKEN; ++i) {
    const float v = fminf(fmaxf(x[first + i] / scale, lowest), top);
    codes |= (__builtin_bit_cast(uint32_t, v + WHOLE) & 15) << i * 4;
  }
  return scale > 0 ? codes : 0;
}

}  // namespace nunchaku_py::cuda
