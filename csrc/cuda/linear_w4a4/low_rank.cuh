// The low-rank branch in the accumulators: acc += h·upᵀ, sixteen ranks at a time, h rounded to the type of up.
#pragma once
#include "cuda/linear_w4a4/mainloop_sm80.cuh"

namespace nunchaku_py::cuda {

template <class T>
struct LowRank {
  const float* h;  // (M, R)
  const T* up;     // (N, R)
  int R;           // a multiple of 16
};

template <class T>
DEVICE uint32_t load_hidden(const LowRank<T>& in, int row, int rank, int M) {
  if (row >= M) return 0;
  const float2 two = ldg<float2>(in.h + size_t(row) * in.R + rank);
  return cvt_16bitx2<T>(two.x, two.y);
}

template <class Tile, class T>
DEVICE void add_low_rank(Sums<Tile>& acc, const LowRank<T>& in, int M, int N, const Place<Tile>& at) {
  const int row = at.m0 + at.row + at.g, channel = at.channel(at.column) + at.g;  // a warp's columns are neighbours
  for (int r = at.t * 2; r < in.R; r += 16) {
    uint32_t up[Tile::NT][2];
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n) {
      const bool inside = channel + n * 8 < N;
      const T* from = in.up + size_t(inside ? channel + n * 8 : 0) * in.R + r;
      for (int j = 0; j < 2; ++j) up[n][j] = inside ? ldg<uint32_t>(from + j * 8) : 0;
    }
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) {
      uint32_t h[4];
      for (int i = 0; i < 4; ++i) h[i] = load_hidden(in, row + m * 16 + i % 2 * 8, r + i / 2 * 8, M);
#pragma unroll
      for (int n = 0; n < Tile::NT; ++n) mma_m16n8k16<T>(acc[m][n], h, up[n]);
    }
  }
}

}  // namespace nunchaku_py::cuda
