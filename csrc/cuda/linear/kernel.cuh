// A linear as one kernel, for any numbers: main loop, scales, low-rank branch, bias, epilogue.
#pragma once
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/group.cuh"
#include "cuda/linear/mainloop_sm75.cuh"
#include "cuda/linear/mainloop_sm80.cuh"
#include "cuda/linear/slab.cuh"

namespace nunchaku_py::cuda {

// ---- what the target has --------------------------------------------------------------------------------------------
template <class Tile, class Numbers, int SM>
using BuffersOf = std::conditional_t<(SM >= 80), Buffers<Tile, Numbers>, BuffersSm75<Tile, Numbers>>;

// Shared memory for the main loop, and after it for a slab and what an epilogue lays behind it.
template <class Tile, class Numbers, int SM>
constexpr int shared_bytes(int behind_slab = 0) {
  const int buffers = sizeof(BuffersOf<Tile, Numbers, SM>), later = sizeof(Slab<Tile>) + behind_slab;
  return buffers > later ? buffers : later;
}

template <class Tile, class Numbers>
DEVICE auto& buffers(void* shared) {
  return *static_cast<BuffersOf<Tile, Numbers, TARGET>*>(shared);
}

// That a multiprocessor has room for, by registers: the fewer, the more a thread may use.
template <class Tile>
constexpr int BLOCKS = Tile::LARGE    ? 1
                       : TARGET >= 80 ? 3
                                      : 2;

// Whether there is code of a kernel for the target. sm_75 has no registers for large tiles.
template <class Tile, class Numbers, class T>
constexpr bool BUILT = MULTIPLIES<T> && Numbers::MULTIPLIED && (TARGET >= 80 || !Tile::LARGE);

// ---- the kernel -----------------------------------------------------------------------------------------------------
DEVICE void add_bias(float (&y)[VECTOR], const float* bias) {
  const float4 by = ldg<float4>(bias);
  y[0] += by.x, y[1] += by.y, y[2] += by.z, y[3] += by.w;
}

// What a tile's sums stand for, the branch included.
template <class Tile, class Numbers, class T>
DEVICE void complete(Sums<Tile>& y, const Sums<Tile, typename Numbers::Sum>& sums, const Linear<T>& p, Corner corner) {
  Numbers::template scaled<Tile>(y, sums, p.in, Place<Tile>{corner});
  add_low_rank<Tile>(y, p.branch, p.in.M, p.in.N, corner);
}

// y to where it goes, with its bias.
template <class Tile, class T, class Epilogue>
DEVICE void finish(const Sums<Tile>& y, void* shared, const Part<T, Epilogue>& part, Corner corner) {
  const Linear<T>& p = part.linear;
  const auto visit = [&](float (&values)[VECTOR], int, int row, int column) {
    const Cell cell = {corner.m0 + row, corner.n0 + column, corner.m0 + row < p.in.M && corner.n0 + column < p.in.N};
    if (cell.inside) add_bias(values, p.bias + cell.column);
    part.ending(values, cell);
  };
  visit_rows<Tile>(*static_cast<Slab<Tile>*>(shared), y, corner, visit, [](int) {});
}

// Block (x, y) takes the rows of its turn, and columns y·BN ….
template <class Tile, class Numbers, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::THREADS, BLOCKS<Tile>) linear_kernel(Group<T, Epilogue> group) {
  if constexpr (BUILT<Tile, Numbers, T>) {
    SHARED_DYNAMIC(shared);
    const int n0 = int(blockIdx.y) * Tile::BN;
    Sums<Tile, typename Numbers::Sum> sums = {};
    if (const Turn turn = turn_of_block<Tile>(group); n0 < group.parts[turn.part].linear.in.N)
      multiply<Tile, Numbers>(sums, buffers<Tile, Numbers>(shared), group.parts[turn.part].linear.in, {turn.m0, n0, 0});
    const Turn turn = turn_of_block<Tile>(group);
    const Part<T, Epilogue>& part = group.parts[turn.part];
    if (n0 >= part.linear.in.N) return;
    const Corner corner = {turn.m0, n0, 0};
    Sums<Tile> y;
    complete<Tile, Numbers>(y, sums, part.linear, corner);
    finish<Tile>(y, shared, part, corner);
  }
}

}  // namespace nunchaku_py::cuda
