// The low-rank branch in the accumulators: acc += h·upᵀ, sixteen ranks at a time, h rounded to the type of up.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/linear/stage.cuh"

namespace nunchaku_py::cuda {

template <class T>
struct LowRank {
  const float* h;  // (M, R)
  const T* up;     // (N, R)
  int R;           // a multiple of 16
};

// Sixteen ranks of a row of h, for one thread: two pairs each of rows `row` and `row` + 8.
template <class T>
DEVICE void load_hidden(uint32_t (&h)[4], const LowRank<T>& in, int row, int rank, int M) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int of = row + i % 2 * 8;
    const float2 two = of < M ? ldg<float2>(in.h + uint32_t(of * in.R + rank + i / 2 * 8)) : float2{};
    h[i] = cvt_16bitx2<T>(two.x, two.y);
  }
}

// h stays in registers while up passes: as many fragments of it are there as the accumulators leave room for.
template <class Tile, class T>
DEVICE void add_low_rank(Sums<Tile>& acc, const LowRank<T>& in, int M, int N, Corner corner) {
  const Place<Tile> at{corner};
  const int row = at.m0 + at.row + at.g, channel = at.channel(at.column) + at.g;  // a warp's columns are neighbours
#pragma unroll 1
  for (int r = at.t * 2; r < in.R; r += 16) {
    uint32_t h[Tile::MT][4];
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) load_hidden(h[m], in, row + m * 16, r, M);
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n) {
      const bool inside = channel + n * 8 < N;
      const T* const from = in.up + uint32_t((channel + n * 8) * in.R + r);
      const uint32_t up[2] = {inside ? ldg<uint32_t>(from) : 0, inside ? ldg<uint32_t>(from + 8) : 0};
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m) mma_m16n8k16<T>(acc[m][n], h[m], up);
    }
  }
}

}  // namespace nunchaku_py::cuda
