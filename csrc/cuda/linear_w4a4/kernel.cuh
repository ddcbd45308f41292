// linear_w4a4 as one kernel: main loop, low-rank branch, bias, epilogue. A launch has one problem or several, of which
// none needs the others: their rows of tiles stand one after another.
#pragma once
#include <climits>

#include "cuda/linear_w4a4/epilogue.cuh"
#include "cuda/linear_w4a4/low_rank.cuh"
#include "cuda/linear_w4a4/mainloop_sm75.cuh"
#include "cuda/linear_w4a4/mainloop_sm80.cuh"
#include "cuda/linear_w4a4/slab.cuh"

namespace nunchaku_py::cuda {

template <class T>
struct Linear {
  Operands<T> in;
  LowRank<T> branch;
  const float* bias;  // (N)
};

// ---- several problems in a launch -----------------------------------------------------------------------------------
constexpr int PARTS = 6;  // q, k, v of two streams

template <class T, class Ending>
struct Part {
  Linear<T> linear;
  Ending ending;
};

template <class T, class Ending>
struct Group {
  Part<T, Ending> parts[PARTS];
  // Of a part's rows of tiles in the launch's; of parts that are not there, beyond the last.
  int first[PARTS] = {0, INT_MAX, INT_MAX, INT_MAX, INT_MAX, INT_MAX};
};

// Which part a block works for, and the first of its rows there. Found anew where it is wanted, as Place is.
struct Turn {
  int part, m0;
};

template <class Tile, class T, class Ending>
DEVICE Turn turn_of_block(const Group<T, Ending>& group) {
  const int block = this_block();
  int part = 0;
#pragma unroll
  for (int i = 1; i < PARTS; ++i) part += block >= group.first[i];
  return {part, (block - group.first[part]) * Tile::BM};
}

// ---- what the target has --------------------------------------------------------------------------------------------
template <class Tile, int SM>
using BuffersOf = std::conditional_t<(SM >= 80), Buffers<Tile>, BuffersSm75<Tile>>;

// Shared memory for the main loop, and after it for a slab and what an epilogue lays behind it.
template <class Tile, int SM>
constexpr int shared_bytes(int behind_slab = 0) {
  const int buffers = sizeof(BuffersOf<Tile, SM>), later = sizeof(Slab<Tile>) + behind_slab;
  return buffers > later ? buffers : later;
}

template <class Tile>
DEVICE auto& buffers(void* shared) {
  return *static_cast<BuffersOf<Tile, TARGET>*>(shared);
}

// That a multiprocessor has room for, by registers: the fewer, the more a thread may use.
template <class Tile>
constexpr int BLOCKS = Tile::LARGE ? 1 : TARGET >= 80 ? 3 : 2;

// Whether there is code of a kernel for the target. sm_75 has no registers for large tiles.
template <class Tile, class T>
constexpr bool BUILT = MULTIPLIES<T> && (TARGET >= 80 || !Tile::LARGE);

// ---- the kernel -----------------------------------------------------------------------------------------------------
DEVICE void add_bias(float (&y)[VECTOR], const float* bias) {
  const float4 by = ldg<float4>(bias);
  y[0] += by.x, y[1] += by.y, y[2] += by.z, y[3] += by.w;
}

template <class Tile, class T, class Epilogue>
DEVICE void finish(Sums<Tile>& acc, void* shared, const Part<T, Epilogue>& part, Corner corner) {
  const Linear<T>& p = part.linear;
  add_low_rank<Tile>(acc, p.branch, p.in.M, p.in.N, corner);
  const auto visit = [&](float(&y)[VECTOR], int, int row, int column) {
    const Cell cell = {corner.m0 + row, corner.n0 + column,
                       corner.m0 + row < p.in.M && corner.n0 + column < p.in.N};
    if (cell.inside) add_bias(y, p.bias + cell.column);
    part.ending(y, cell);
  };
  visit_rows<Tile>(*static_cast<Slab<Tile>*>(shared), acc, corner, visit, [](int) {});
}

// Block (x, y) takes the rows of its turn, and columns y·BN ….
template <class Tile, bool UNSIGNED, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::THREADS, BLOCKS<Tile>) linear_w4a4_kernel(Group<T, Epilogue> group) {
  if constexpr (BUILT<Tile, T>) {
    SHARED_DYNAMIC(shared);
    const int n0 = int(blockIdx.y) * Tile::BN;
    Sums<Tile> acc = {};
    if (const Turn turn = turn_of_block<Tile>(group); n0 < group.parts[turn.part].linear.in.N)
      multiply<UNSIGNED>(acc, buffers<Tile>(shared), group.parts[turn.part].linear.in, {turn.m0, n0, 0});
    const Turn turn = turn_of_block<Tile>(group);
    if (n0 < group.parts[turn.part].linear.in.N)
      finish<Tile>(acc, shared, group.parts[turn.part], {turn.m0, n0, 0});
  }
}

}  // namespace nunchaku_py::cuda
