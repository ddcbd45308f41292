// What is multiplied at a time: a stage in shared memory, and where each thread reads and writes for it.
#pragma once
#include <cstring>

#include "cuda/common/memory.cuh"
#include "cuda/common/platform.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/linear_w4a4/tile.h"

namespace nunchaku_py::cuda {

template <class T>
struct Operands {
  const uint8_t *qx, *qw;  // (M, K/2) and (N, K/2), even k in the low nibble
  const T *sx, *sw;        // (G, scale_rows(M)), (G, scale_rows(N)): see scales.h
  int M, N, K;             // K a multiple of 64
  int jump = 0;  // between the channels of a tile's columns 63 and 64, beyond one: value and gate side by side
};

// DEPTH groups of all rows of the tile.
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
// Worked out once. A thread copies every THREADS-th chunk of codes, and eight scales if it is one of the first.
template <class Tile>
struct Notes {
  static constexpr int STEP = Tile::THREADS / CHUNKS;  // rows between two chunks that a thread copies
  static constexpr int X = Tile::BM / STEP, W = Tile::BN / STEP;
  static constexpr int SCALING = (Tile::SCALED_ROWS + Tile::BN) / 8;  // threads that copy scales of a group
  static_assert(Tile::BM % STEP == 0 && Tile::BN % STEP == 0, "every thread copies as many chunks");
  static_assert(DEPTH * SCALING <= Tile::THREADS, "a thread copies eight scales at most");

  // In a stage, in bytes, of x in the lower half, of w in the upper: what ldmatrix wants of a thread for the first
  // fragments of the first group; and the scales of its fragments in a group.
  uint32_t fragments, scales;
  uint32_t to;          // lower half: where in a stage the first chunk goes that it copies; upper: groups of K
  uint32_t scale_step;  // bytes between the scales of two stages
  const uint8_t *scale, *x[X], *w[W];  // what it copies for the first stage
};

DEVICE int lower(uint32_t halves) {
  return halves & 0xffff;
}
DEVICE int upper(uint32_t halves) {
  return halves >> 16;
}

// Rows beyond the end are the last one again: what comes of them is not written.
DEVICE const uint8_t* row_of(const uint8_t* codes, int row, int rows, int K) {
  return codes + size_t(row < rows ? row : rows - 1) * (K / 2);
}

// Of a group, x's scales and then w's are copied, eight by a thread.
template <class Tile, class T>
DEVICE void note_scales(Notes<Tile>& notes, const Operands<T>& in, const Place<Tile>& at) {
  const int group = at.thread / notes.SCALING, first = at.thread % notes.SCALING * 8;
  const bool of_x = first < Tile::SCALED_ROWS;
  const int row = of_x ? at.m0 / SCALE_BLOCK * SCALE_BLOCK + first : at.channel(first - Tile::SCALED_ROWS);
  const int pitch = scale_rows(of_x ? in.M : in.N);
  const T* const scales = (of_x ? in.sx : in.sw) + size_t(group) * pitch + (row < pitch ? row : pitch - 8);
  notes.scale = reinterpret_cast<const uint8_t*>(scales);
  notes.scale_step = DEPTH * pitch * sizeof(T);
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
  notes.scales = int(sizeof(T)) * (scales_x | (Tile::SCALED_ROWS + scales_w) << 16);
  const int row = at.thread / CHUNKS, chunk = at.thread % CHUNKS;
  notes.to = chunk_offset(row, chunk) | in.K / GROUP << 16;
  note_scales(notes, in, at);
  for (int i = 0; i < notes.X; ++i) notes.x[i] = row_of(in.qx, at.m0 + row + i * notes.STEP, in.M, in.K) + chunk * 16;
  for (int i = 0; i < notes.W; ++i)
    notes.w[i] = row_of(in.qw, at.channel(row + i * notes.STEP), in.N, in.K) + chunk * 16;
  return notes;
}

// A stage is named by how many groups are `left` from its first on: one number to keep, not two.
//
// Bytes from a thread's chunks for the first stage to those for this one. Where one group is left, the second half of
// the chunks would be beyond the end of the row: the first half again.
template <class Tile>
DEVICE int64_t to_chunks(const Notes<Tile>& notes, int left) {
  const bool beyond = left < DEPTH && threadIdx.x % CHUNKS >= CHUNKS / DEPTH;
  return (upper(notes.to) - left - beyond) * int64_t(ROW_BYTES);
}

template <class Tile>
DEVICE bool copies_scales(const Notes<Tile>& notes, int left) {
  return int(threadIdx.x) < notes.SCALING * (left < DEPTH ? left : DEPTH);
}

template <class Tile>
DEVICE const void* scales_to_copy(const Notes<Tile>& notes, int left) {
  return notes.scale + uint64_t(notes.scale_step) * (unsigned(upper(notes.to) - left) / DEPTH);
}

}  // namespace nunchaku_py::cuda
