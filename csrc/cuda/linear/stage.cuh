// What is multiplied at a time: a stage in shared memory, and where each thread reads and writes for it.
#pragma once
#include <cstring>

#include "cuda/common/memory.cuh"
#include "cuda/common/platform.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/linear/tile.h"

namespace nunchaku_py::cuda {

// The numbers that are multiplied are a type (linear_w4a4/int4.cuh …), which says
//   Sum             in what products are added up: float or int
//   SCALE_BYTES     of a row's scale for a step; 0: there is none
//   places(at)      where in a step's scales those of a thread's fragments begin, in bytes: of x, of w
//   multiply_step   a step's products
//   scaled          what becomes of the sums at the end: floats
struct Operands {
  const uint8_t *qx, *qw;  // (M, row) and (N, row) bytes; of two codes in a byte even k is the lower one
  const uint8_t *sx, *sw;  // scales of steps, (steps, scale_rows(M)) and (steps, scale_rows(N)); or null
  const float *row_scales, *channel_scales;  // (M), (N); or null
  int M, N, steps;                           // a row is so many steps
  int jump = 0;  // between the channels of a tile's columns 63 and 64, beyond one: value and gate side by side
};

// A stage is DEPTH steps of all rows of the tile.
constexpr int DEPTH = 2, STAGE_ROW = DEPTH * STEP_BYTES, CHUNKS = STAGE_ROW / 16;

template <class Tile, class Numbers>
struct alignas(16) Stage {
  static constexpr int SCALES = (Tile::SCALED_ROWS + Tile::BN) * Numbers::SCALE_BYTES;  // of a step: x's, then w's
  uint8_t x[Tile::BM * STAGE_ROW], w[Tile::BN * STAGE_ROW];
  uint8_t scales[SCALES ? DEPTH * SCALES : 16];  // C++ has no empty arrays
};

// The chunks of 16 bytes change places from row to row, so that ldmatrix meets no bank twice.
DEVICE int chunk_offset(int row, int chunk) {
  return row * STAGE_ROW + (chunk ^ row / 2 % CHUNKS) * 16;
}

struct Corner {
  int m0, n0, jump;  // of a tile in y; Operands::jump

  DEVICE int channel(int of_tile) const { return n0 + of_tile + (of_tile >= SCALE_BLOCK ? jump : 0); }
};

// Where a thread stands: its warp's corner in the block's tile, and its place in every fragment (row g,
// columns 2t and 2t + 1). Each part of a kernel finds it for itself, so that none keeps it in registers for another.
template <class Tile>
struct Place : Corner {
  int thread = this_thread(), lane = thread % 32, warp = thread / 32;
  int row = warp / Tile::WARPS_N * Tile::WM, column = warp % Tile::WARPS_N * Tile::WN;
  int g = lane / 4, t = lane % 4;
};

// ---- what a thread does for each stage ------------------------------------------------------------------------------
// Worked out once. A thread copies every THREADS-th chunk of codes, and a chunk of scales if it is one of the first.
template <class Tile, class Numbers>
struct Notes {
  static constexpr int STEP = Tile::THREADS / CHUNKS;  // rows between two chunks that a thread copies
  static constexpr int X = Tile::BM / STEP, W = Tile::BN / STEP;
  static constexpr int SCALING = Stage<Tile, Numbers>::SCALES / 16;  // threads that copy scales of a step
  static_assert(Tile::BM % STEP == 0 && Tile::BN % STEP == 0, "every thread copies as many chunks");
  static_assert(DEPTH * SCALING <= Tile::THREADS, "a thread copies a chunk of scales at most");

  // In a stage, in bytes, of x in the lower half, of w in the upper: what ldmatrix wants of a thread for the first
  // fragments of the first step; and the scales of its fragments in a step.
  uint32_t fragments, scales;
  uint32_t to;          // lower half: where in a stage the first chunk goes that it copies; upper: steps of a row
  uint32_t scale_step;  // bytes between the scales of two stages
  const uint8_t *scale, *x[X], *w[W];  // what it copies for the first stage
};

DEVICE uint32_t halves(int lower, int upper) {
  return uint32_t(lower) | uint32_t(upper) << 16;
}
DEVICE int lower(uint32_t halves) {
  return halves & 0xffff;
}
DEVICE int upper(uint32_t halves) {
  return halves >> 16;
}

// Rows beyond the end are the last one again: what comes of them is not written.
DEVICE const uint8_t* row_of(const uint8_t* codes, int row, int rows, int steps) {
  return codes + size_t(row < rows ? row : rows - 1) * steps * STEP_BYTES;
}

// Of a step, x's scales and then w's are copied, 16 bytes by a thread.
template <class Tile, class Numbers>
DEVICE void note_scales(Notes<Tile, Numbers>& notes, const Operands& in, const Place<Tile>& at) {
  if constexpr (Numbers::SCALE_BYTES > 0) {
    constexpr int ROWS = 16 / Numbers::SCALE_BYTES;  // whose scales are a chunk
    const int step = at.thread / notes.SCALING, first = at.thread % notes.SCALING * ROWS;
    const bool of_x = first < Tile::SCALED_ROWS;
    const int row = of_x ? at.m0 / SCALE_BLOCK * SCALE_BLOCK + first : at.channel(first - Tile::SCALED_ROWS);
    const int pitch = scale_rows(of_x ? in.M : in.N);
    const size_t place = size_t(step) * pitch + (row < pitch ? row : pitch - ROWS);
    notes.scale = (of_x ? in.sx : in.sw) + place * Numbers::SCALE_BYTES;
    notes.scale_step = DEPTH * pitch * Numbers::SCALE_BYTES;
    notes.scales = Numbers::places(at);
  }
}

template <class Tile, class Numbers>
DEVICE Notes<Tile, Numbers> noted(const Operands& in, const Place<Tile>& at) {
  Notes<Tile, Numbers> notes = {};
  // Sixteen rows on the chunks of the swizzle have the same places again; the next step is 32 bytes away, in its
  // exclusive sense.
  notes.fragments = halves(chunk_offset(at.row + at.lane % 16, at.lane / 16),
                           chunk_offset(at.column + at.lane / 16 * 8 + at.lane % 8, at.lane / 8 % 2));
  const int row = at.thread / CHUNKS, chunk = at.thread % CHUNKS;
  notes.to = halves(chunk_offset(row, chunk), in.steps);
  note_scales(notes, in, at);
  for (int i = 0; i < notes.X; ++i)
    notes.x[i] = row_of(in.qx, at.m0 + row + i * notes.STEP, in.M, in.steps) + chunk * 16;
  for (int i = 0; i < notes.W; ++i)
    notes.w[i] = row_of(in.qw, at.channel(row + i * notes.STEP), in.N, in.steps) + chunk * 16;
  return notes;
}

// A stage is named by how many steps are `left` from its first on: one number to keep, not two.
//
// Bytes from a thread's chunks for the first stage to those for this one. Where one step is left, the second half of
// the chunks would be beyond the end of the row: the first half again.
template <class Tile, class Numbers>
DEVICE int64_t to_chunks(const Notes<Tile, Numbers>& notes, int left) {
  const bool beyond = left < DEPTH && threadIdx.x % CHUNKS >= CHUNKS / DEPTH;
  return (upper(notes.to) - left - beyond) * int64_t(STEP_BYTES);
}

template <class Tile, class Numbers>
DEVICE bool copies_scales(const Notes<Tile, Numbers>& notes, int left) {
  return int(threadIdx.x) < notes.SCALING * (left < DEPTH ? left : DEPTH);
}

template <class Tile, class Numbers>
DEVICE const void* scales_to_copy(const Notes<Tile, Numbers>& notes, int left) {
  return notes.scale + uint64_t(notes.scale_step) * (unsigned(upper(notes.to) - left) / DEPTH);
}

}  // namespace nunchaku_py::cuda
