// The main loop for sm_75, which has no cp.async: the next stage comes through registers while one is multiplied. Its
// notes stay in registers too, as shared memory for two blocks on a multiprocessor is only for stages.
#pragma once
#include "cuda/linear/products.cuh"

namespace nunchaku_py::cuda {

template <class Tile, class Numbers>
struct BuffersSm75 {
  Stage<Tile, Numbers> stages[2];
};

// What a thread has of a stage on its way.
template <class Tile, class Numbers>
struct Carried {
  uint4 x[Notes<Tile, Numbers>::X], w[Notes<Tile, Numbers>::W], scales;
};

template <class Tile, class Numbers>
DEVICE void load_stage(Carried<Tile, Numbers>& carried, const Notes<Tile, Numbers>& notes, int left) {
  const int64_t offset = to_chunks(notes, left);
#pragma unroll
  for (int i = 0; i < notes.X; ++i) carried.x[i] = ldg<uint4>(notes.x[i] + offset);
#pragma unroll
  for (int i = 0; i < notes.W; ++i) carried.w[i] = ldg<uint4>(notes.w[i] + offset);
  if (copies_scales(notes, left)) carried.scales = ldg<uint4>(scales_to_copy(notes, left));
}

template <class Tile, class Numbers>
DEVICE void store_stage(Stage<Tile, Numbers>& stage, const Carried<Tile, Numbers>& carried,
                        const Notes<Tile, Numbers>& notes, int left) {
  const int to = lower(notes.to);
#pragma unroll
  for (int i = 0; i < notes.X; ++i) sts(stage.x + to + i * notes.STEP * STAGE_ROW, carried.x[i]);
#pragma unroll
  for (int i = 0; i < notes.W; ++i) sts(stage.w + to + i * notes.STEP * STAGE_ROW, carried.w[i]);
  if (copies_scales(notes, left)) sts(stage.scales + threadIdx.x * 16, carried.scales);
}

template <class Tile, class Numbers>
DEVICE void multiply(Sums<Tile, typename Numbers::Sum>& acc, BuffersSm75<Tile, Numbers>& shared, const Operands& in,
                     Corner corner) {
  const Notes<Tile, Numbers> notes = noted<Tile, Numbers>(in, Place<Tile>{corner});
  int left = in.steps, stage = 0;
  Carried<Tile, Numbers> carried = {};
  load_stage(carried, notes, left);
  store_stage(shared.stages[0], carried, notes, left);
#pragma unroll 1
  for (; left > 0; left -= DEPTH, stage = 1 - stage) {
    __syncthreads();  // the stage is there for all, and nobody reads any more what is filled after it
    if (left > DEPTH) load_stage(carried, notes, left - DEPTH);
    multiply_stage(acc, shared.stages[stage], left, notes);
    if (left > DEPTH) store_stage(shared.stages[1 - stage], carried, notes, left - DEPTH);
  }
}

}  // namespace nunchaku_py::cuda
