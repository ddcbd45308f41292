// A stage's products in the accumulators: acc[m,n] += sx[m,g]·sw[n,g]·(Σ_{k in g} qx[m,k]·qw[n,k]) for its groups g.
//
// Codes are read as they are stored, row by row: ldmatrix hands each thread the eight nibbles that mma wants of it. The
// integer product starts from 0x4B400000: read as a float it is 1.5·2²³ + p, exactly, p being the sum over the group
// (|p| ≤ 64·15·8). So p·sx is one fma, and acc another: no conversion from integer, which runs at half the rate.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/ldmatrix.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/linear_w4a4/stage.cuh"

namespace nunchaku_py::cuda {

constexpr int WHOLE_BITS = 0x4B400000;  // of WHOLE

template <class Tile>
using Sums = float[Tile::MT][Tile::NT][4];

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

template <bool UNSIGNED, class T, class Tile>
DEVICE void multiply_group(Sums<Tile>& acc, const Stage<Tile>& stage, int group, const Notes<Tile>& at) {
  uint32_t pairs_x[Tile::MT], pairs_w[Tile::NT];  // of scales; w's stay in 16 bits until they are used, once
  const auto* const scales = reinterpret_cast<const unsigned char*>(stage.scales[group]);
  load_words(pairs_x, scales + lower(at.scales));
  load_words(pairs_w, scales + upper(at.scales));
  RowScales sx[Tile::MT];
  uint32_t x[Tile::MT][4];
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m) {
    sx[m] = row_scales<T>(pairs_x[m]);
    ldmatrix_x4(x[m], stage.x + (lower(at.fragments) ^ group * ROW_BYTES) + m * 16 * STAGE_ROW);
  }
#pragma unroll
  for (int n = 0; n < Tile::NT; n += 2) {
    uint32_t w[4];  // of two fragments
    ldmatrix_x4(w, stage.w + (upper(at.fragments) ^ group * ROW_BYTES) + n * 8 * STAGE_ROW);
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

template <bool UNSIGNED, class T, class Tile>
DEVICE void multiply_stage(Sums<Tile>& acc, const Stage<Tile>& stage, int groups, const Notes<Tile>& at) {
#pragma unroll
  for (int group = 0; group < DEPTH; ++group)
    if (group < groups) multiply_group<UNSIGNED, T, Tile>(acc, stage, group, at);
}

}  // namespace nunchaku_py::cuda
