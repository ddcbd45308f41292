// The main loop for sm_75, which has no cp.async: the next stage comes through registers while one is multiplied. Its
// notes stay in registers too, as shared memory for two blocks on a multiprocessor is only for stages.
#pragma once
#include "cuda/linear_w4a4/products.cuh"

namespace nunchaku_py::cuda {

template <class Tile>
struct BuffersSm75 {
  Stage<Tile> stages[2];
};

// What a thread has of a stage on its way.
template <class Tile>
struct Carried {
  uint4 x[Notes<Tile>::X], w[Notes<Tile>::W], scales;
};

template <class Tile>
DEVICE void load_stage(Carried<Tile>& carried, const Notes<Tile>& notes, int left) {
  const int64_t offset = to_chunks(notes, left);
#pragma unroll
  for (int i = 0; i < notes.X; ++i) carried.x[i] = ldg<uint4>(notes.x[i] + offset);
#pragma unroll
  for (int i = 0; i < notes.W; ++i) carried.w[i] = ldg<uint4>(notes.w[i] + offset);
  if (copies_scales(notes, left)) carried.scales = ldg<uint4>(scales_to_copy(notes, left));
}

template <class Tile>
DEVICE void store_stage(Stage<Tile>& stage, const Carried<Tile>& carried, const Notes<Tile>& notes, int left) {
  const int to = lower(notes.to);
#pragma unroll
  for (int i = 0; i < notes.X; ++i) sts(stage.x + to + i * notes.STEP * STAGE_ROW, carried.x[i]);
#pragma unroll
  for (int i = 0; i < notes.W; ++i) sts(stage.w + to + i * notes.STEP * STAGE_ROW, carried.w[i]);
  if (copies_scales(notes, left)) sts(&stage.scales[0][0] + threadIdx.x * 8, carried.scales);
}

template <bool UNSIGNED, class Tile, class T>
DEVICE void multiply(Sums<Tile>& acc, BuffersSm75<Tile>& shared, const Operands<T>& in, Corner corner) {
  const Notes<Tile> notes = noted(in, Place<Tile>{corner});
  int left = in.K / GROUP, stage = 0;
  Carried<Tile> carried = {};
  load_stage(carried, notes, left);
  store_stage(shared.stages[0], carried, notes, left);
#pragma unroll 1
  for (; left > 0; left -= DEPTH, stage = 1 - stage) {
    __syncthreads();  // the stage is there for all, and nobody reads any more what is filled after it
    if (left > DEPTH) load_stage(carried, notes, left - DEPTH);
    multiply_stage<UNSIGNED, T>(acc, shared.stages[stage], left, notes);
    if (left > DEPTH) store_stage(shared.stages[1 - stage], carried, notes, left - DEPTH);
  }
}

}  // namespace nunchaku_py::cuda
