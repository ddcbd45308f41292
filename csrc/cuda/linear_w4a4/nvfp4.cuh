// NVFP4 by NVFP4: acc[m,n] = c[n]·Σ_g sx[m,g]·sw[n,g]·Σ_k qx[m,k]·qw[n,k] over groups of 16, of which an instruction
// takes four, and their scales, e4m3, as one word: sx and sw are (K/64, scale_rows(rows)) words, rows in their order.
#pragma once
#include <utility>

#include "cuda/common/mma.cuh"
#include "cuda/linear/products.cuh"
#include "cuda/quantize_act/codes.cuh"

namespace nunchaku_py::cuda {

// body(0 as a type), body(1 as a type) …: for what takes numbers that are known when it is compiled.
template <int COUNT, class Body>
DEVICE void for_each_number(Body body) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, COUNT>{});
}

struct Nvfp4 {
  using Sum = float;
  using To = ToNvfp4;  // what an ending quantizes to
  static constexpr int SCALE_BYTES = 4;
  static constexpr bool MULTIPLIED = MULTIPLIES_NVFP4;
  static constexpr int X = 2, W = 4;  // fragments whose scales the four lanes of a quad have between them

  // Of every X·16 rows, lanes 2i and 2i + 1 of a quad hold g and g + 8 of fragment i; of every W·8 columns, lane i
  // holds g of fragment i. A warp reads 32 neighbouring words: no bank twice.
  template <class Tile>
  DEVICE static uint32_t places(const Place<Tile>& at) {
    const int pair = Tile::MT == 1 ? 0 : at.t / 2;
    const int x = at.row / SCALE_BLOCK * SCALE_BLOCK + (at.m0 + at.row) % SCALE_BLOCK + pair * 16 + at.t % 2 * 8 + at.g;
    const int w = Tile::SCALED_ROWS + at.column + at.t * 8 + at.g;
    return halves(SCALE_BYTES * x, SCALE_BYTES * w);
  }

  template <class Tile>
  DEVICE static void multiply_step(Sums<Tile>& acc, const Stage<Tile, Nvfp4>& stage, int step,
                                   const Notes<Tile, Nvfp4>& at) {
    static_assert((Tile::MT == 1 || Tile::MT % X == 0) && Tile::NT % W == 0, "a word is of so many fragments");
    uint32_t sx[(Tile::MT + 1) / X], sw[Tile::NT / W], x[Tile::MT][4];
    const uint8_t* const scales = stage.scales + step * stage.SCALES;
    load_words(sx, scales + lower(at.scales), X * 16);
    load_words(sw, scales + upper(at.scales), W * 8);
    load_x(x, stage, step, at);
    for_each_number<Tile::NT / 2>([&](auto two) {
      constexpr int N = 2 * decltype(two)::value;
      uint32_t w[4];
      load_w(w, stage, step, at, N);
      for_each_number<Tile::MT>([&](auto m) {
        constexpr int M = decltype(m)::value;
        mma_m16n8k64_nvf4<M % X, N % W>(acc[M][N], x[M], {w[0], w[1]}, sx[M / X], sw[N / W]);
        mma_m16n8k64_nvf4<M % X, N % W + 1>(acc[M][N + 1], x[M], {w[2], w[3]}, sx[M / X], sw[N / W]);
      });
    });
  }

  template <class Tile>
  DEVICE static void scaled(Sums<Tile>& y, const Sums<Tile>& sums, const Operands& in, const Place<Tile>& at) {
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n) {
      const int channel = at.channel(at.column + n * 8 + at.t * 2);
      const float2 by = channel < in.N ? ldg<float2>(in.channel_scales + channel) : float2{};
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) y[m][n][i] = sums[m][n][i] * (i % 2 ? by.y : by.x);
    }
  }

 private:
  template <int WORDS>
  DEVICE static void load_words(uint32_t (&to)[WORDS], const uint8_t* shared, int rows_apart) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) to[i] = lds<uint32_t>(shared + i * rows_apart * SCALE_BYTES);
  }
};

}  // namespace nunchaku_py::cuda
