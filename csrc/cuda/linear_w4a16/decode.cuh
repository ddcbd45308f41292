// y = x·wᵀ + h·upᵀ + bias, w = code·scale (+ zero) rounded to the type of x, sums in fp32. Everything lies in rows, as
// files hold it.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/memory.cuh"

namespace nunchaku_py::cuda {

constexpr int OWN_WEIGHTS = 32;  // neighbours that a thread decodes, 16 bytes in one piece, which share a scale

template <class T>
struct Decoded {
  const T* x;               // (M, K)
  const uint8_t* qw;        // (N, K/2)
  const T *scales, *zeros;  // (N, ceil(K/group)); zeros: null if codes are signed
  const float* h;           // (M, R)
  const T* up;              // (N, R)
  const float* bias;        // (N)
  T* y;                     // (M, N)
  int M, N, K, R, group;    // K and group multiples of 32
};

// How a channel's 32 weights are decoded.
struct Grid {
  float scale, zero;
};

// Eight weights, rounded to T: a code in the last bits of 2²³ is a float, from which 2²³ is taken off again.
template <class T, bool SIGNED>
DEVICE void decode_eight(float (&w)[8], uint32_t codes, Grid grid) {
  constexpr float BASE = 8388608.f;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float two[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t code = codes >> (i + j) * 4 & 15;
      const uint32_t bits = (SIGNED ? code ^ 8 : code) | 0x4B000000;
      two[j] = fmaf(__builtin_bit_cast(float, bits) - (SIGNED ? BASE + 8 : BASE), grid.scale, grid.zero);
    }
    float rounded[2];
    cvt_f32x2<T>(rounded, cvt_16bitx2<T>(two[0], two[1]));
    w[i] = rounded[0], w[i + 1] = rounded[1];
  }
}

}  // namespace nunchaku_py::cuda
