// The main loop for sm_80 and later: acc[m,n] = Σ_g sx[m,g]·sw[n,g]·(Σ_{k in g} qx[m,k]·qw[n,k]), groups of 64.
//
// Codes are read as they are stored, row by row: ldmatrix hands each thread the eight nibbles that mma wants of it. The
// integer product starts from 0x4B400000: read as a float it is 1.5·2²³ + p, exactly, p being the sum over the group
// (|p| ≤ 64·15·8). So p·sw is one fma, and acc another: no conversion from integer, which runs at half the rate.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/cp_async.cuh"
#include "cuda/common/ldmatrix.cuh"
#include "cuda/common/memory.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/platform.cuh"
#include "cuda/linear_w4a4/tile.h"

namespace nunchaku_py::cuda {

constexpr int WHOLE_BITS = 0x4B400000;  // of WHOLE

template <class T>
struct Operands {
  const uint8_t *qx, *qw;  // (M, K/2) and (N, K/2), even k in the low nibble
  const T *sx, *sw;        // (G, scale_rows(M)), (G, scale_rows(N)): see scales.h
  int M, N, K;             // K a multiple of 64
  int jump = 0;  // between the channels of a tile's columns 63 and 64, beyond one: value and gate side by side
};

// What is copied at once: DEPTH groups of all rows of the tile.
constexpr int DEPTH = 2, STAGE_ROW = DEPTH * ROW_BYTES, CHUNKS = STAGE_ROW / 16;

template <class Tile>
struct alignas(16) Stage {
  uint8_t x[Tile::BM * STAGE_ROW], w[Tile::BN * STAGE_ROW];
  uint16_t scales[DEPTH][Tile::SCALED_ROWS + Tile::BN];  // of x, then of w
};

// The chunks of 16 bytes change places from row to row, so that ldmatrix meets no bank twice.
DEVICE int chunk_offset(int row, int chunk) {
  return row * STAGE_ROW + (chunk ^ row / 2 % CHUNKS) * 16;
}

// Where a thread stands: its warp's corner in the block's tile, and its place in every fragment (row g,
// columns 2t and 2t + 1).
template <class Tile>
struct Place {
  int m0, n0, jump;  // the tile's corner in y, and Operands::jump
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row = warp / Tile::WARPS_N * Tile::WM, column = warp % Tile::WARPS_N * Tile::WN;
  int g = lane / 4, t = lane % 4;
  // Where ldmatrix finds this thread's row of the first fragments of x, and of w, in a stage's first group. Sixteen
  // rows on the chunks have the same places again; the next group is 32 bytes away, in the exclusive sense of the
  // swizzle.
  int x = chunk_offset(row + lane % 16, lane / 16);
  int w = chunk_offset(column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  int sx = row / SCALE_BLOCK * SCALE_BLOCK + g * 8 + (m0 + row) % SCALE_BLOCK / 8;
  int sw = column / SCALE_BLOCK * SCALE_BLOCK + t * 16 + column % SCALE_BLOCK / 4;

  DEVICE int channel(int of_tile) const { return n0 + of_tile + (of_tile >= SCALE_BLOCK ? jump : 0); }
};

// ---- global → shared ------------------------------------------------------------------------------------------------
// What one thread copies for each stage: every THREADS-th chunk of codes, and eight scales if it is one of the first.
// All addresses are worked out once; a stage further they are a constant apart.
template <class Tile, class T>
class Copier {
  static constexpr int STEP = Tile::THREADS / CHUNKS;  // rows between two chunks of a thread
  static constexpr int X = Tile::BM / STEP, W = Tile::BN / STEP, EIGHTS = (Tile::SCALED_ROWS + Tile::BN) / 8;
  static_assert(Tile::BM % STEP == 0 && Tile::BN % STEP == 0, "every thread copies as many chunks");
  static_assert(DEPTH * EIGHTS <= Tile::THREADS, "a thread copies eight scales at most");

  const uint8_t *x_, *w_;
  const T* scale_ = nullptr;
  size_t far_, jump_;   // bytes from a row to the one STEP further; and what the second 64 columns are further still
  int codes_, scales_;  // where in a stage
  int scale_pitch_ = 0;
  int left_, scales_left_ = 0;  // groups to copy, if positive: beyond the end of K is zero
  uint32_t inside_ = 0;         // a bit for each chunk: rows beyond the end are zero

 public:
  DEVICE Copier(const Operands<T>& in, const Place<Tile>& at) {
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const size_t pitch = in.K / 2;
    x_ = in.qx + (at.m0 + row) * pitch + chunk * 16;
    w_ = in.qw + (at.n0 + row) * pitch + chunk * 16;
    far_ = STEP * pitch, jump_ = in.jump * pitch;
    left_ = in.K / GROUP - chunk / 2;
    codes_ = chunk_offset(row, chunk);
    for (int i = 0; i < X; ++i) inside_ |= uint32_t(at.m0 + row + i * STEP < in.M) << i;
    for (int i = 0; i < W; ++i) inside_ |= uint32_t(at.channel(row + i * STEP) < in.N) << (X + i);
    if (threadIdx.x < DEPTH * EIGHTS) find_scales(in, at, threadIdx.x / EIGHTS, threadIdx.x % EIGHTS * 8);
  }

  DEVICE void next(Stage<Tile>& stage) {
    const uint32_t inside = left_ > 0 ? inside_ : 0;
#pragma unroll
    for (int i = 0; i < X; ++i)
      cp_async16(stage.x + codes_ + i * STEP * STAGE_ROW, x_ + i * far_, inside >> i & 1 ? 16 : 0);
#pragma unroll
    for (int i = 0; i < W; ++i)
      cp_async16(stage.w + codes_ + i * STEP * STAGE_ROW, w_ + i * far_ + (i * STEP >= SCALE_BLOCK ? jump_ : 0),
                 inside >> (X + i) & 1 ? 16 : 0);
    if (scale_) {
      cp_async16(reinterpret_cast<uint8_t*>(&stage) + scales_, scale_, scales_left_ > 0 ? 16 : 0);
      scale_ += DEPTH * size_t(scale_pitch_);
    }
    x_ += STAGE_ROW, w_ += STAGE_ROW;
    left_ -= DEPTH, scales_left_ -= DEPTH;
  }

 private:
  // Of `group`, the eight from `first` on of the scales that a stage has.
  DEVICE void find_scales(const Operands<T>& in, const Place<Tile>& at, int group, int first) {
    const bool of_x = first < Tile::SCALED_ROWS;
    const int row = of_x ? at.m0 / SCALE_BLOCK * SCALE_BLOCK + first : at.channel(first - Tile::SCALED_ROWS);
    scale_pitch_ = scale_rows(of_x ? in.M : in.N);
    scales_left_ = row < scale_pitch_ ? in.K / GROUP - group : 0;
    scale_ = (of_x ? in.sx : in.sw) + size_t(group) * scale_pitch_ + row;
    scales_ = (Tile::BM + Tile::BN) * STAGE_ROW + (group * EIGHTS * 8 + first) * 2;
  }
};

// ---- shared → registers → sums --------------------------------------------------------------------------------------
template <class Tile>
using Sums = float[Tile::MT][Tile::NT][4];

template <int WORDS>
DEVICE void load_words(uint32_t (&to)[WORDS], const void* shared) {
  const auto* from = static_cast<const char*>(shared);
  if constexpr (WORDS % 4 == 0) {
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = lds<uint4>(from + i * 4);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else {
    for (int i = 0; i < WORDS; ++i) to[i] = lds<uint32_t>(from + i * 4);
  }
}

// Pairs of scales, neighbours in memory.
template <class T, int PAIRS>
DEVICE void load_scales(float (&to)[PAIRS][2], const uint16_t* shared) {
  uint32_t words[PAIRS];
  load_words(words, shared);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) cvt_f32x2<T>(to[i], words[i]);
}

template <bool UNSIGNED>
DEVICE void multiply_group(float (&acc)[4], const uint32_t (&x)[4], const uint32_t (&w)[2], const float (&sx)[2],
                           const float (&sw)[2], const float (&off)[2]) {
  int sum[4];
  if constexpr (UNSIGNED)
    mma_m16n8k64_u4s4_from(sum, x, w, WHOLE_BITS);
  else
    mma_m16n8k64_s4_from(sum, x, w, WHOLE_BITS);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float scaled = fmaf(__builtin_bit_cast(float, sum[i]), sw[i % 2], off[i % 2]);
    acc[i] = fmaf(scaled, sx[i / 2], acc[i]);
  }
}

template <bool UNSIGNED, class T, class Tile>
DEVICE void multiply_stage(Sums<Tile>& acc, const Stage<Tile>& stage, int group, const Place<Tile>& at) {
  float sx[Tile::MT][2], sw[Tile::NT][2];
  load_scales<T>(sx, stage.scales[group] + at.sx);
  load_scales<T>(sw, stage.scales[group] + Tile::SCALED_ROWS + at.sw);
  uint32_t x[Tile::MT][4];
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m) ldmatrix_x4(x[m], stage.x + (at.x ^ group * ROW_BYTES) + m * 16 * STAGE_ROW);
#pragma unroll
  for (int n = 0; n < Tile::NT; n += 2) {
    uint32_t w[4];  // of two fragments
    ldmatrix_x4(w, stage.w + (at.w ^ group * ROW_BYTES) + n * 8 * STAGE_ROW);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float off[2] = {-WHOLE * sw[n + j][0], -WHOLE * sw[n + j][1]};  // exact: a scale has 11 bits at most
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m)
        multiply_group<UNSIGNED>(acc[m][n + j], x[m], {w[j * 2], w[j * 2 + 1]}, sx[m], sw[n + j], off);
    }
  }
}

template <bool UNSIGNED, class Tile, class T>
DEVICE void multiply(Sums<Tile>& acc, Stage<Tile>* stages, const Operands<T>& in, const Place<Tile>& at) {
  Copier<Tile, T> copier(in, at);
  const int count = (in.K / GROUP + DEPTH - 1) / DEPTH;
  for (int k = 0; k < Tile::STAGES - 1; ++k) {
    if (k < count) copier.next(stages[k]);
    cp_async_commit();
  }
  int stage = 0, free = Tile::STAGES - 1;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    cp_async_wait<Tile::STAGES - 2>();
    __syncthreads();  // stage k is there for all, and nobody reads any more what is filled now
    if (k + Tile::STAGES - 1 < count) copier.next(stages[free]);
    cp_async_commit();
#pragma unroll 1
    for (int group = 0; group < DEPTH; ++group) multiply_stage<UNSIGNED, T, Tile>(acc, stages[stage], group, at);
    free = stage;
    stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;
  }
}

}  // namespace nunchaku_py::cuda
