// From accumulators to rows: what epilogues see. Sixteen rows of every warp at a time go through shared memory, as
// floats; then a warp takes a whole row of the block's tile, each thread four neighbouring columns.
#pragma once
#include "cuda/linear/stage.cuh"

namespace nunchaku_py::cuda {

constexpr int VECTOR = 4;  // columns that a thread sees

template <class Tile>
struct Slab {
  static constexpr int ROWS = Tile::BM / Tile::WM * 16;
  static constexpr int PITCH = Tile::BN + 8;       // fragments are stored, and rows read, without bank conflicts
  static constexpr int LANES = Tile::BN / VECTOR;  // threads of a row
  static_assert(32 % LANES == 0 || LANES % 32 == 0);
  alignas(16) float values[ROWS * PITCH];
};

template <class Tile>
DEVICE void store_slab(Slab<Tile>& slab, const Sums<Tile>& acc, int m, const Place<Tile>& at) {
  const int row = at.row / Tile::WM * 16 + at.g, column = at.column + at.t * 2;
#pragma unroll
  for (int n = 0; n < Tile::NT; ++n)
    for (int i = 0; i < 2; ++i)
      sts(slab.values + (row + i * 8) * Slab<Tile>::PITCH + column + n * 8,
          float2{acc[m][n][i * 2], acc[m][n][i * 2 + 1]});
}

// The row of the tile that row i of slab m is.
template <class Tile>
DEVICE int row_of_slab(int m, int i) {
  return i / 16 * Tile::WM + m * 16 + i % 16;
}

// visit(values, i, row, column) for each row of the tile, row i of its slab; all threads of a warp come together, also
// for rows beyond M. visited(m): all rows of slab m have been.
template <class Tile, class Visit, class Visited>
DEVICE void visit_rows(Slab<Tile>& slab, const Sums<Tile>& acc, Corner corner, Visit visit, Visited visited) {
  constexpr int LANES = Slab<Tile>::LANES, STEP = Tile::THREADS / LANES;
#pragma unroll
  for (int m = 0; m < Tile::MT; ++m) {
    __syncthreads();  // the stages, or the last slab, are read
    store_slab<Tile>(slab, acc, m, Place<Tile>{corner});
    __syncthreads();
    for (int i = threadIdx.x / LANES; i < Slab<Tile>::ROWS; i += STEP) {
      const int column = this_thread() % LANES * VECTOR;
      const float4 found = lds<float4>(slab.values + i * Slab<Tile>::PITCH + column);
      float values[VECTOR] = {found.x, found.y, found.z, found.w};
      visit(values, i, row_of_slab<Tile>(m, i), column);
    }
    visited(m);
  }
}

}  // namespace nunchaku_py::cuda
