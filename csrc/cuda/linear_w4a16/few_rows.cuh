// linear_w4a16 for few rows, which is bound by reading the weight.
//
// A warp takes CHANNELS output channels and ROWS rows. Each lane has 32 neighbouring weights of every 1024, 16 bytes in
// one piece, which share a scale; x comes from the cache. The lanes' sums are added in a fixed order.
#pragma once
#include "cuda/common/warp.cuh"
#include "cuda/linear_w4a16/decode.cuh"

namespace nunchaku_py::cuda {

constexpr int FEW_WARPS = 4, CHANNELS = 2;
template <int ROWS>
constexpr int FEW_BLOCKS = ROWS == 1 ? 8 : ROWS == 2 ? 6 : 3;  // on a multiprocessor: reads under way, and registers

template <class T>
DEVICE void load_eight(float (&x)[8], const T* from) {
  const uint4 four = ldg<uint4>(from);
  const uint32_t pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float two[2];
    cvt_f32x2<T>(two, pairs[i]);
    x[i * 2] = two[0], x[i * 2 + 1] = two[1];
  }
}

// One more of the lane's stretches of 32 inputs.
template <class T, int ROWS, bool SIGNED>
DEVICE void add_stretch(float (&acc)[ROWS][CHANNELS], const Decoded<T>& p, const int (&rows)[ROWS],
                        const int (&channels)[CHANNELS], int k) {
  uint4 codes[CHANNELS];
  Grid grids[CHANNELS];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const size_t of = size_t(channels[c]) * ((p.K + p.group - 1) / p.group) + k / p.group;
    codes[c] = ldg<uint4>(p.qw + size_t(channels[c]) * (p.K / 2) + k / 2);
    grids[c] = {cvt_f32(ldg<T>(p.scales + of)), SIGNED ? 0.f : cvt_f32(ldg<T>(p.zeros + of))};
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float w[CHANNELS][8];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const uint32_t words[4] = {codes[c].x, codes[c].y, codes[c].z, codes[c].w};
      decode_eight<T, SIGNED>(w[c], words[i], grids[c]);
    }
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      float x[8];
      load_eight(x, p.x + size_t(rows[m]) * p.K + k + i * 8);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[m][c] = fmaf(x[j], w[c][j], acc[m][c]);
    }
  }
}

template <class T, int ROWS>
DEVICE void add_rank(float (&acc)[ROWS][CHANNELS], const Decoded<T>& p, const int (&rows)[ROWS],
                     const int (&channels)[CHANNELS], int r) {
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    const float h = ldg<float>(p.h + size_t(rows[m]) * p.R + r);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
      acc[m][c] = fmaf(h, cvt_f32(ldg<T>(p.up + size_t(channels[c]) * p.R + r)), acc[m][c]);
  }
}

DEVICE float sum_of_lanes(float value) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) value += shfl_xor(value, lanes);
  return value;
}

// Rows and channels beyond the end are the last one again, and are not written.
template <class T, int ROWS, bool SIGNED>
__global__ void __launch_bounds__(FEW_WARPS * 32, FEW_BLOCKS<ROWS>) few_rows_kernel(Decoded<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = blockIdx.x * ROWS, n0 = (blockIdx.y * FEW_WARPS + warp) * CHANNELS;
  int rows[ROWS], channels[CHANNELS];
#pragma unroll
  for (int m = 0; m < ROWS; ++m) rows[m] = m0 + m < p.M ? m0 + m : p.M - 1;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) channels[c] = n0 + c < p.N ? n0 + c : p.N - 1;
  float acc[ROWS][CHANNELS] = {};
  for (int k = lane * OWN_WEIGHTS; k < p.K; k += 32 * OWN_WEIGHTS)
    add_stretch<T, ROWS, SIGNED>(acc, p, rows, channels, k);
  for (int r = lane; r < p.R; r += 32) add_rank(acc, p, rows, channels, r);
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float y = sum_of_lanes(acc[m][c]);
      if (lane == 0 && m0 + m < p.M && n0 + c < p.N)
        stg(p.y + size_t(m0 + m) * p.N + n0 + c, cvt_16bit<T>(y + ldg<float>(p.bias + n0 + c)));
    }
  }
}

}  // namespace nunchaku_py::cuda
