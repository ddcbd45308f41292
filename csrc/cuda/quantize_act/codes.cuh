// Codes and scales of values that neighbouring threads hold: what every kernel that quantizes shares.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/memory.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/scales.h"
#include "cuda/common/warp.cuh"

namespace nunchaku_py::cuda {

// Where the codes and scales of an activation go, and of what size it is.
struct Quantizing {
  uint8_t* qx;  // (M, K/2), INT8: (M, K)
  void* sx;     // by the codes, see there
  int M, K;     // K a multiple of 64
  bool is_unsigned;
};

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

// Of two tops the larger; NaN if one is.
DEVICE float larger(float a, float b) {
  return b > a || b != b ? b : a;
}

// The scale in its stored type; one too large becomes the largest that is finite.
template <class T>
DEVICE T round_scale(float scale) {
  constexpr float LARGEST = std::is_same_v<T, bf16> ? 0x1.fep127f : 65504.f;
  return cvt_16bit<T>(scale > LARGEST ? LARGEST : scale);
}

// COUNT codes of BITS each, from x[first] on, the first lowest; zero where the scale is zero or NaN. The last bits of
// v + WHOLE are v rounded, in two's complement.
template <int BITS, int COUNT, int OWN>
DEVICE uint32_t codes_of(const float (&x)[OWN], float scale, float lowest, float top, int first = 0) {
  static_assert(BITS * COUNT <= 32 && COUNT <= OWN);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float v = fminf(fmaxf(x[first + i] / scale, lowest), top);
    codes |= (__builtin_bit_cast(uint32_t, v + WHOLE) & ((1 << BITS) - 1)) << i * BITS;
  }
  return scale > 0 ? codes : 0;
}

// INT4 in groups of 64, signed or not; scales T, (K/64, scale_rows(M)), see scale_of_row.
template <class T>
struct ToInt4 {
  static constexpr bool BUILT = true;  // for every target

  // OWN neighbours of a row, from `column` on; all threads of a group call together, also where nothing is `inside`.
  template <int OWN>
  DEVICE static void store(const Quantizing& to, const float (&x)[OWN], int row, int column, bool inside) {
    const float lowest = to.is_unsigned ? 0.f : -7.f, top = to.is_unsigned ? 15.f : 7.f;
    const T stored = round_scale<T>(group_top<GROUP / OWN>(x, to.is_unsigned) / top);
    if (!inside) return;
    const float scale = cvt_f32(stored);
    uint8_t* const codes = to.qx + size_t(row) * (to.K / 2) + column / 2;
    if constexpr (OWN == 4)
      stg(codes, uint16_t(codes_of<4, 4>(x, scale, lowest, top)));
    else
      stg(codes, uint2{codes_of<4, 8>(x, scale, lowest, top), codes_of<4, 8>(x, scale, lowest, top, 8)});
    if (column % GROUP == 0)
      stg(static_cast<T*>(to.sx) + size_t(column / GROUP) * scale_rows(to.M) + scale_of_row(row), stored);
  }
};

// COUNT e2m1 of x/scale, from x[first] on, the first lowest; zero where the scale is zero or NaN. What rounds to zero
// keeps its sign.
template <int COUNT, int OWN>
DEVICE uint32_t e2m1_of(const float (&x)[OWN], float scale, int first = 0) {
  static_assert(COUNT % 2 == 0 && COUNT <= 8 && COUNT <= OWN);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) codes |= cvt_e2m1x2(x[first + i] / scale, x[first + i + 1] / scale) << i * 4;
  return scale > 0 ? codes : 0;
}

// NVFP4: e2m1 in groups of 16; scales e4m3, (K/64, scale_rows(M), 4).
struct ToNvfp4 {
  static constexpr bool BUILT = MULTIPLIES_NVFP4;
  static constexpr int SHARING = 16;  // inputs that share a scale

  template <int OWN>
  DEVICE static void store(const Quantizing& to, const float (&x)[OWN], int row, int column, bool inside) {
    const e4m3 stored = cvt_e4m3(group_top<SHARING / OWN>(x, false) / 6.f);
    if (!inside) return;
    const float scale = cvt_f32(stored);
    uint8_t* const codes = to.qx + size_t(row) * (to.K / 2) + column / 2;
    if constexpr (OWN == 4)
      stg(codes, uint16_t(e2m1_of<4>(x, scale)));
    else
      stg(codes, uint2{e2m1_of<8>(x, scale), e2m1_of<8>(x, scale, 8)});
    if (column % SHARING == 0) {
      const size_t word = size_t(column / GROUP) * scale_rows(to.M) + row;
      stg(static_cast<e4m3*>(to.sx) + word * 4 + column % GROUP / SHARING, stored);
    }
  }
};

}  // namespace nunchaku_py::cuda
