// linear_w4a4 as one kernel: main loop, low-rank branch, bias, epilogue.
#pragma once
#include "cuda/linear_w4a4/epilogue.cuh"
#include "cuda/linear_w4a4/low_rank.cuh"
#include "cuda/linear_w4a4/mainloop_sm80.cuh"
#include "cuda/linear_w4a4/slab.cuh"

namespace nunchaku_py::cuda {

template <class T>
struct Linear {
  Operands<T> in;
  LowRank<T> branch;
  const float* bias;  // (N)
};

// Shared memory for the main loop, and after it for a slab and what an epilogue lays behind it.
template <class Tile>
HOST_DEVICE constexpr int shared_bytes(int behind_slab = 0) {
  const int buffers = sizeof(Buffers<Tile>), later = sizeof(Slab<Tile>) + behind_slab;
  return buffers > later ? buffers : later;
}

template <bool UNSIGNED, class Tile, class T>
DEVICE void compute(Sums<Tile>& acc, void* shared, const Linear<T>& p, Corner corner) {
  multiply<UNSIGNED, Tile>(acc, *static_cast<Buffers<Tile>*>(shared), p.in, corner);
  cp_async_wait<0>();
  add_low_rank<Tile>(acc, p.branch, p.in.M, p.in.N, corner);
}

DEVICE void add_bias(float (&y)[VECTOR], const float* bias) {
  const float4 by = ldg<float4>(bias);
  y[0] += by.x, y[1] += by.y, y[2] += by.z, y[3] += by.w;
}

template <class Tile, bool UNSIGNED, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) linear_w4a4_kernel(Linear<T> p, Epilogue epilogue) {
  SHARED_DYNAMIC(shared);
  const Corner corner = {int(blockIdx.x) * Tile::BM, int(blockIdx.y) * Tile::BN, 0};
  Sums<Tile> acc = {};
  compute<UNSIGNED, Tile>(acc, shared, p, corner);
  const Place<Tile> at{corner};
  const auto visit = [&](float(&y)[VECTOR], int, int row, int column) {
    const Cell cell = {at.m0 + row, at.n0 + column, at.m0 + row < p.in.M && at.n0 + column < p.in.N};
    if (cell.inside) add_bias(y, p.bias + cell.column);
    epilogue(y, cell);
  };
  visit_rows<Tile>(*reinterpret_cast<Slab<Tile>*>(shared), acc, at, visit, [](int) {});
}

}  // namespace nunchaku_py::cuda
