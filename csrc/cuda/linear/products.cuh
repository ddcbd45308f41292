// A stage's products in the accumulators. Codes are read as they are stored, row by row: ldmatrix hands each thread the
// bytes of a step that mma wants of it, and they are the same for 4-bit and for 8-bit codes.
#pragma once
#include "cuda/common/ldmatrix.cuh"
#include "cuda/linear/stage.cuh"

namespace nunchaku_py::cuda {

// Fragments of a step: of x all that a warp has, of w those of columns n·8 to n·8 + 15.
template <class Tile, class Numbers>
DEVICE void load_x(uint32_t (&x)[Tile::MT][4], const Stage<Tile, Numbers>& stage, int step,
                   const Notes<Tile, Numbers>& at) {
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m)
    ldmatrix_x4(x[m], stage.x + (lower(at.fragments) ^ step * STEP_BYTES) + m * 16 * STAGE_ROW);
}

template <class Tile, class Numbers>
DEVICE void load_w(uint32_t (&w)[4], const Stage<Tile, Numbers>& stage, int step, const Notes<Tile, Numbers>& at,
                   int n) {
  ldmatrix_x4(w, stage.w + (upper(at.fragments) ^ step * STEP_BYTES) + n * 8 * STAGE_ROW);
}

template <class Tile, class Numbers>
DEVICE void multiply_stage(Sums<Tile, typename Numbers::Sum>& acc, const Stage<Tile, Numbers>& stage, int steps,
                           const Notes<Tile, Numbers>& at) {
#pragma unroll
  for (int step = 0; step < DEPTH; ++step)
    if (step < steps) Numbers::template multiply_step<Tile>(acc, stage, step, at);
}

// visit(m, n, i) for every element of a thread's fragments.
template <class Tile, class Visit>
DEVICE void for_each_sum(Visit visit) {
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m)
#pragma unroll
    for (int n = 0; n < Tile::NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(m, n, i);
}

}  // namespace nunchaku_py::cuda
