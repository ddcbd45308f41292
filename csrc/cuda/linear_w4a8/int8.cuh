// INT8 by INT8: acc[m,n] = (Σ_k qx[m,k]·w8[n,k])·sx[m]·s_ch[n], the sum over all of K in 32 bits. A step is 32 inputs.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/linear/products.cuh"

namespace nunchaku_py::cuda {

struct Int8 {
  using Sum = int;
  static constexpr int SCALE_BYTES = 0;
  static constexpr bool MULTIPLIED = TARGET != 90;  // Hopper has a kernel of its own

  template <class Tile>
  DEVICE static void multiply_step(Sums<Tile, int>& acc, const Stage<Tile, Int8>& stage, int step,
                                   const Notes<Tile, Int8>& at) {
    uint32_t x[Tile::MT][4];
    load_x(x, stage, step, at);
#pragma unroll
    for (int n = 0; n < Tile::NT; n += 2) {
      uint32_t w[4];
      load_w(w, stage, step, at, n);
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m) {
        mma_m16n8k32_s8(acc[m][n], x[m], {w[0], w[1]});
        mma_m16n8k32_s8(acc[m][n + 1], x[m], {w[2], w[3]});
      }
    }
  }

  template <class Tile>
  DEVICE static void scaled(Sums<Tile>& y, const Sums<Tile, int>& sums, const Operands& in, const Place<Tile>& at) {
    float rows[Tile::MT][2];
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m)
      for (int i = 0; i < 2; ++i) {
        const int row = at.m0 + at.row + m * 16 + i * 8 + at.g;
        rows[m][i] = row < in.M ? ldg<float>(in.row_scales + row) : 0.f;
      }
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n) {
      const int channel = at.channel(at.column + n * 8 + at.t * 2);
      const float2 by = channel < in.N ? ldg<float2>(in.channel_scales + channel) : float2{};
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) y[m][n][i] = cvt_f32(sums[m][n][i]) * rows[m][i / 2] * (i % 2 ? by.y : by.x);
    }
  }
};

}  // namespace nunchaku_py::cuda
