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
#include "cuda/common/warp.cuh"
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

struct Corner {
  int m0, n0, jump;  // of a tile in y; Operands::jump
};

// Where a thread stands: its warp's corner in the block's tile, and its place in every fragment (row g,
// columns 2t and 2t + 1). Each part of a kernel finds it for itself, so that none keeps it in registers for another.
template <class Tile>
struct Place : Corner {
  int thread = this_thread(), lane = thread % 32, warp = thread / 32;
  int row = warp / Tile::WARPS_N * Tile::WM, column = warp % Tile::WARPS_N * Tile::WN;
  int g = lane / 4, t = lane % 4;

  DEVICE int channel(int of_tile) const { return n0 + of_tile + (of_tile >= SCALE_BLOCK ? jump : 0); }
};

// ---- what a thread does for each stage ------------------------------------------------------------------------------
// Where it reads and writes, worked out once. It waits in shared memory: registers are for sums, and the compiler would
// work it out again for each stage rather than keep it.
template <class Tile>
struct alignas(16) Notes {
  static constexpr int STEP = Tile::THREADS / CHUNKS;  // rows between two chunks that a thread copies
  static constexpr int X = Tile::BM / STEP, W = Tile::BN / STEP;
  static_assert(Tile::BM % STEP == 0 && Tile::BN % STEP == 0, "every thread copies as many chunks");

  // In a stage, of x in the lower half, of w in the upper: what ldmatrix wants of a thread for the first fragments of
  // the first group; and the scales of its fragments.
  uint32_t fragments, scales;
  uint32_t scale, scale_step;  // eight scales to copy, from the operand's first; to those of the next stage
  uint32_t x[X], w[W];         // bytes to the chunks to copy, from the operand's first
};

DEVICE int lower(uint32_t halves) {
  return halves & 0xffff;
}
DEVICE int upper(uint32_t halves) {
  return halves >> 16;
}

// Rows beyond the end are the last one again: what comes of them is not written.
DEVICE uint32_t row_offset(int row, int rows, int K) {
  return uint32_t(row < rows ? row : rows - 1) * (K / 2);
}

// Which scales of a group a thread copies, if any: of x, then of w, eight of each stage's DEPTH groups.
template <class Tile>
struct Eight {
  static constexpr int COUNT = (Tile::SCALED_ROWS + Tile::BN) / 8;
  static_assert(DEPTH * COUNT <= Tile::THREADS, "a thread copies eight scales at most");
  int thread, group = thread / COUNT, first = thread % COUNT * 8;
  bool of_x = first < Tile::SCALED_ROWS;
};

template <class Tile, class T>
DEVICE void note_scales(Notes<Tile>& notes, const Operands<T>& in, const Place<Tile>& at) {
  const Eight<Tile> eight{at.thread};
  const int row = eight.of_x ? at.m0 / SCALE_BLOCK * SCALE_BLOCK + eight.first
                             : at.channel(eight.first - Tile::SCALED_ROWS);
  const int pitch = scale_rows(eight.of_x ? in.M : in.N);
  notes.scale = eight.group * pitch + (row < pitch ? row : pitch - 8);
  notes.scale_step = DEPTH * pitch;
}

template <class Tile, class T>
DEVICE Notes<Tile> noted(const Operands<T>& in, const Place<Tile>& at) {
  Notes<Tile> notes;
  // Sixteen rows on the chunks of the swizzle have the same places again; the next group is 32 bytes away, in its
  // exclusive sense.
  notes.fragments = chunk_offset(at.row + at.lane % 16, at.lane / 16) |
                    chunk_offset(at.column + at.lane / 16 * 8 + at.lane % 8, at.lane / 8 % 2) << 16;
  const int scales_x = at.row / SCALE_BLOCK * SCALE_BLOCK + at.g * 8 + (at.m0 + at.row) % SCALE_BLOCK / 8;
  const int scales_w = at.column / SCALE_BLOCK * SCALE_BLOCK + at.t * 16 + at.column % SCALE_BLOCK / 4;
  notes.scales = scales_x | (Tile::SCALED_ROWS + scales_w) << 16;
  note_scales(notes, in, at);
  const int row = at.thread / CHUNKS, chunk = at.thread % CHUNKS * 16;
  for (int i = 0; i < notes.X; ++i) notes.x[i] = row_offset(at.m0 + row + i * notes.STEP, in.M, in.K) + chunk;
  for (int i = 0; i < notes.W; ++i) notes.w[i] = row_offset(at.channel(row + i * notes.STEP), in.N, in.K) + chunk;
  return notes;
}

template <class Tile>
DEVICE void store_notes(Notes<Tile>& to, const Notes<Tile>& notes) {
  for (size_t i = 0; i < sizeof(notes) / 16; ++i)
    sts(reinterpret_cast<uint4*>(&to) + i, reinterpret_cast<const uint4*>(&notes)[i]);
}

template <class Tile>
DEVICE Notes<Tile> load_notes(const Notes<Tile>& from) {
  Notes<Tile> notes;
  for (size_t i = 0; i < sizeof(notes) / 16; ++i)
    reinterpret_cast<uint4*>(&notes)[i] = lds<uint4>(reinterpret_cast<const uint4*>(&from) + i);
  return notes;
}

// ---- global → shared ------------------------------------------------------------------------------------------------
// Stage k: every THREADS-th chunk of codes is a thread's own, and eight scales if it is one of the first. `groups`: how
// many there still are from this stage on.
template <class Tile, class T>
DEVICE void copy_stage(Stage<Tile>& stage, const Operands<T>& in, const Notes<Tile>& notes, int k, int groups) {
  // Where one group is left, the second half of the chunks would be beyond the end of the row: the first half again.
  const bool beyond = groups < DEPTH && threadIdx.x % CHUNKS >= CHUNKS / DEPTH;
  const int from = k * STAGE_ROW - (beyond ? ROW_BYTES : 0);
  const int to = chunk_offset(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
#pragma unroll
  for (int i = 0; i < notes.X; ++i)
    cp_async16(stage.x + to + i * notes.STEP * STAGE_ROW, in.qx + from + notes.x[i], 16);
#pragma unroll
  for (int i = 0; i < notes.W; ++i)
    cp_async16(stage.w + to + i * notes.STEP * STAGE_ROW, in.qw + from + notes.w[i], 16);
  const Eight<Tile> eight{int(threadIdx.x)};
  uint16_t* const scales = &stage.scales[0][0] + threadIdx.x * 8;
  const uint32_t scale = notes.scale + k * notes.scale_step;
  if (eight.group >= (groups < DEPTH ? groups : DEPTH)) return;
  if (eight.of_x)  // two instructions, so that no pointer need be kept
    cp_async16(scales, in.sx + scale, 16);
  else
    cp_async16(scales, in.sw + scale, 16);
}

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

template <bool UNSIGNED>
DEVICE void multiply_fragments(float (&acc)[4], const uint32_t (&x)[4], const uint32_t (&w)[2], const float (&sx)[2],
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
DEVICE void multiply_group(Sums<Tile>& acc, const Stage<Tile>& stage, int group, const Notes<Tile>& at) {
  uint32_t pairs_x[Tile::MT], pairs_w[Tile::NT];  // of scales; w's stay in 16 bits until they are used, once
  load_words(pairs_x, stage.scales[group] + lower(at.scales));
  load_words(pairs_w, stage.scales[group] + upper(at.scales));
  float sx[Tile::MT][2];
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m) cvt_f32x2<T>(sx[m], pairs_x[m]);
  uint32_t x[Tile::MT][4];
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m)
    ldmatrix_x4(x[m], stage.x + (lower(at.fragments) ^ group * ROW_BYTES) + m * 16 * STAGE_ROW);
#pragma unroll
  for (int n = 0; n < Tile::NT; n += 2) {
    uint32_t w[4];  // of two fragments
    ldmatrix_x4(w, stage.w + (upper(at.fragments) ^ group * ROW_BYTES) + n * 8 * STAGE_ROW);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sw[2];
      cvt_f32x2<T>(sw, pairs_w[n + j]);
      const float off[2] = {-WHOLE * sw[0], -WHOLE * sw[1]};  // exact: a scale has 11 bits at most
#pragma unroll
      for (int m = 0; m < Tile::MT; ++m)
        multiply_fragments<UNSIGNED>(acc[m][n + j], x[m], {w[j * 2], w[j * 2 + 1]}, sx[m], sw, off);
    }
  }
}

template <class Tile>
struct Buffers {
  Stage<Tile> stages[Tile::STAGES];
  Notes<Tile> notes[Tile::THREADS];
};

template <bool UNSIGNED, class Tile, class T>
DEVICE void multiply(Sums<Tile>& acc, Buffers<Tile>& shared, const Operands<T>& in, Corner corner) {
  constexpr int AHEAD = Tile::STAGES - 1;  // stages that are on their way while one is multiplied
  int left = in.K / GROUP;                 // groups from stage k on
  store_notes(shared.notes[threadIdx.x], noted(in, Place<Tile>{corner}));
  for (int k = 0; k < AHEAD; ++k) {
    if (left > k * DEPTH) copy_stage(shared.stages[k], in, load_notes(shared.notes[threadIdx.x]), k, left - k * DEPTH);
    cp_async_commit();
  }
  int stage = 0, free = AHEAD;
#pragma unroll 1
  for (int k = 0; left > 0; ++k, left -= DEPTH) {
    cp_async_wait<AHEAD - 1>();
    __syncthreads();  // stage k is there for all, and nobody reads any more what is filled now
    const Notes<Tile> notes = load_notes(shared.notes[threadIdx.x]);
    if (left > AHEAD * DEPTH) copy_stage(shared.stages[free], in, notes, k + AHEAD, left - AHEAD * DEPTH);
    cp_async_commit();
#pragma unroll
    for (int group = 0; group < DEPTH; ++group)
      if (group < left) multiply_group<UNSIGNED, T, Tile>(acc, shared.stages[stage], group, notes);
    free = stage;
    stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;
  }
}

}  // namespace nunchaku_py::cuda
