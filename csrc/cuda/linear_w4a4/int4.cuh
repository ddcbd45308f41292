// INT4 by INT4 in groups of 64: acc[m,n] += sx[m,g]·sw[n,g]·(Σ_{k in g} qx[m,k]·qw[n,k]). A step is a group.
//
// The integer product starts from 0x4B400000: read as a float it is 1.5·2²³ + p, exactly, p being the sum over
// the group (|p| ≤ 64·15·8). So p·sx is one fma, and acc another: no conversion from integer, which runs at half the rate.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/linear/products.cuh"
#include "cuda/quantize_act/codes.cuh"

namespace nunchaku_py::cuda {

constexpr int WHOLE_BITS = 0x4B400000;  // of WHOLE

template <int WORDS>
DEVICE void load_words(uint32_t (&to)[WORDS], const void* shared) {
  const auto* from = static_cast<const unsigned char*>(shared);
  if constexpr (WORDS % 4 == 0) {
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = lds<uint4>(from + i * 4);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else {
    for (int i = 0; i < WORDS; ++i) to[i] = lds<uint32_t>(from + i * 4);
  }
}

// Scales of a fragment's two rows, and what takes WHOLE off a product with them.
struct RowScales {
  float by[2], off[2];
};

template <class T>
DEVICE RowScales row_scales(uint32_t pair) {
  RowScales rows;
  cvt_f32x2<T>(rows.by, pair);
  for (int i = 0; i < 2; ++i) rows.off[i] = -WHOLE * rows.by[i];  // exact: a scale has 11 bits at most
  return rows;
}

template <bool UNSIGNED>
DEVICE void multiply_fragments(float (&acc)[4], const uint32_t (&x)[4], const uint32_t (&w)[2], const RowScales& sx,
                               const float (&sw)[2]) {
  int sum[4];
  mma_m16n8k64_from<UNSIGNED>(sum, x, w, WHOLE_BITS);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float scaled = fmaf(__builtin_bit_cast(float, sum[i]), sx.by[i / 2], sx.off[i / 2]);
    acc[i] = fmaf(scaled, sw[i % 2], acc[i]);
  }
}

// T: of the scales. UNSIGNED: the codes of x.
template <class T, bool UNSIGNED>
struct Int4 {
  using Sum = float;
  using To = ToInt4<T>;  // what an ending quantizes to
  static constexpr int SCALE_BYTES = sizeof(T);
  static constexpr bool MULTIPLIED = true;  // by every target

  template <class Tile>
  DEVICE static uint32_t places(const Place<Tile>& at) {  // see scales.h
    const int x = at.row / SCALE_BLOCK * SCALE_BLOCK + at.g * 8 + (at.m0 + at.row) % SCALE_BLOCK / 8;
    const int w = at.column / SCALE_BLOCK * SCALE_BLOCK + at.t * 16 + at.column % SCALE_BLOCK / 4;
    return halves(SCALE_BYTES * x, SCALE_BYTES * (Tile::SCALED_ROWS + w));
  }

  template <class Tile>
  DEVICE static void multiply_step(Sums<Tile>& acc, const Stage<Tile, Int4>& stage, int step,
                                   const Notes<Tile, Int4>& at) {
    uint32_t pairs_x[Tile::MT], pairs_w[Tile::NT];  // of scales; w's stay in 16 bits until they are used, once
    const uint8_t* const scales = stage.scales + step * stage.SCALES;
    load_words(pairs_x, scales + lower(at.scales));
    load_words(pairs_w, scales + upper(at.scales));
    RowScales sx[Tile::MT];
    uint32_t x[Tile::MT][4];
#pragma unroll
    for (int m = 0; m < Tile::MT; ++m) sx[m] = row_scales<T>(pairs_x[m]);
    load_x(x, stage, step, at);
#pragma unroll
    for (int n = 0; n < Tile::NT; n += 2) {
      uint32_t w[4];
      load_w(w, stage, step, at, n);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sw[2];
        cvt_f32x2<T>(sw, pairs_w[n + j]);
#pragma unroll
        for (int m = 0; m < Tile::MT; ++m)
          multiply_fragments<UNSIGNED>(acc[m][n + j], x[m], {w[j * 2], w[j * 2 + 1]}, sx[m], sw);
      }
    }
  }

  template <class Tile>
  DEVICE static void scaled(Sums<Tile>& y, const Sums<Tile>& sums, const Operands&, const Place<Tile>&) {
    for_each_sum<Tile>([&](int m, int n, int i) { y[m][n][i] = sums[m][n][i]; });
  }
};

}  // namespace nunchaku_py::cuda
