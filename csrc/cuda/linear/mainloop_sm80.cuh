// The main loop for sm_80 and later: while a stage is multiplied the next ones come by cp.async.
#pragma once
#include "cuda/common/cp_async.cuh"
#include "cuda/linear/products.cuh"

namespace nunchaku_py::cuda {

template <class Tile, class Numbers>
struct Buffers {
  static constexpr int PIECES = sizeof(Notes<Tile, Numbers>) / 16;  // of 16 bytes; after them 8 bytes may be left
  Stage<Tile, Numbers> stages[Tile::STAGES];
  alignas(16) unsigned char notes[sizeof(Notes<Tile, Numbers>) * Tile::THREADS];
};

// Notes wait in shared memory, piece by piece of all threads: registers are for sums, and the compiler would work notes
// out again for each stage rather than keep them.
template <class Tile, class Numbers>
DEVICE void store_notes(Buffers<Tile, Numbers>& to, const Notes<Tile, Numbers>& notes) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&notes);
#pragma unroll
  for (int i = 0; i < to.PIECES; ++i) {
    uint4 piece;
    memcpy(&piece, bytes + i * 16, sizeof piece);
    sts(to.notes + (i * Tile::THREADS + threadIdx.x) * 16, piece);
  }
  if constexpr (sizeof notes % 16 != 0) {
    uint2 rest;
    memcpy(&rest, bytes + to.PIECES * 16, sizeof rest);
    sts(to.notes + to.PIECES * Tile::THREADS * 16 + threadIdx.x * 8, rest);
  }
}

template <class Tile, class Numbers>
DEVICE Notes<Tile, Numbers> load_notes(const Buffers<Tile, Numbers>& from) {
  Notes<Tile, Numbers> notes;
  auto* const bytes = reinterpret_cast<unsigned char*>(&notes);
#pragma unroll
  for (int i = 0; i < from.PIECES; ++i) {
    const uint4 piece = lds<uint4>(from.notes + (i * Tile::THREADS + threadIdx.x) * 16);
    memcpy(bytes + i * 16, &piece, sizeof piece);
  }
  if constexpr (sizeof notes % 16 != 0) {
    const uint2 rest = lds<uint2>(from.notes + from.PIECES * Tile::THREADS * 16 + threadIdx.x * 8);
    memcpy(bytes + from.PIECES * 16, &rest, sizeof rest);
  }
  return notes;
}

template <class Tile, class Numbers>
DEVICE void copy_stage(Stage<Tile, Numbers>& stage, const Notes<Tile, Numbers>& notes, int left) {
  const int64_t offset = to_chunks(notes, left);
  const int to = lower(notes.to);
#pragma unroll
  for (int i = 0; i < notes.X; ++i) cp_async16(stage.x + to + i * notes.STEP * STAGE_ROW, notes.x[i] + offset);
#pragma unroll
  for (int i = 0; i < notes.W; ++i) cp_async16(stage.w + to + i * notes.STEP * STAGE_ROW, notes.w[i] + offset);
  if (copies_scales(notes, left)) cp_async16(stage.scales + threadIdx.x * 16, scales_to_copy(notes, left));
}

// Stages by where they begin, in bytes, in a ring; the other one, where there are two.
template <class Tile, class Numbers>
DEVICE int stage_before(int stage) {
  constexpr int SIZE = sizeof(Stage<Tile, Numbers>), LAST = (Tile::STAGES - 1) * SIZE;
  return Tile::STAGES == 2 ? LAST - stage : stage == 0 ? LAST : stage - SIZE;
}
template <class Tile, class Numbers>
DEVICE int stage_after(int stage) {
  constexpr int SIZE = sizeof(Stage<Tile, Numbers>), LAST = (Tile::STAGES - 1) * SIZE;
  return Tile::STAGES == 2 ? LAST - stage : stage == LAST ? 0 : stage + SIZE;
}

template <class Tile, class Numbers>
DEVICE void multiply(Sums<Tile, typename Numbers::Sum>& acc, Buffers<Tile, Numbers>& shared, const Operands& in,
                     Corner corner) {
  constexpr int AHEAD = Tile::STAGES - 1;  // stages that are on their way while one is multiplied
  const auto at = [&](int offset) -> Stage<Tile, Numbers>& {
    return *reinterpret_cast<Stage<Tile, Numbers>*>(reinterpret_cast<unsigned char*>(shared.stages) + offset);
  };
  store_notes(shared, noted<Tile, Numbers>(in, Place<Tile>{corner}));
  int left = in.steps;
  for (int k = 0; k < AHEAD; ++k) {
    if (left > k * DEPTH) copy_stage(shared.stages[k], load_notes(shared), left - k * DEPTH);
    cp_async_commit();
  }
#pragma unroll 1
  for (int stage = 0; left > 0; left -= DEPTH, stage = stage_after<Tile, Numbers>(stage)) {
    cp_async_wait<AHEAD - 1>();
    __syncthreads();  // the stage is there for all, and nobody reads any more what is filled now
    const Notes<Tile, Numbers> notes = load_notes(shared);
    if (left > AHEAD * DEPTH) copy_stage(at(stage_before<Tile, Numbers>(stage)), notes, left - AHEAD * DEPTH);
    cp_async_commit();
    multiply_stage(acc, at(stage), left, notes);
  }
  cp_async_wait<0>();
}

}  // namespace nunchaku_py::cuda
