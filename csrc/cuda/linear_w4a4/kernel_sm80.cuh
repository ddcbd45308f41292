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

template <class Tile>
HOST_DEVICE constexpr int stages_bytes() {
  const int stages = sizeof(Stage<Tile>) * Tile::STAGES, slab = sizeof(Slab<Tile>);
  return stages > slab ? stages : slab;  // one after the other in the same memory
}

template <bool UNSIGNED, class Tile, class T>
DEVICE void compute(Sums<Tile>& acc, void* shared, const Linear<T>& p, const Place<Tile>& at) {
  multiply<UNSIGNED, Tile>(acc, static_cast<Stage<Tile>*>(shared), p.in, at);
  cp_async_wait<0>();
  add_low_rank<Tile>(acc, p.branch, p.in.M, p.in.N, at);
}

DEVICE void add_bias(float (&y)[VECTOR], const float* bias) {
  const float4 by = ldg<float4>(bias);
  y[0] += by.x, y[1] += by.y, y[2] += by.z, y[3] += by.w;
}

template <class Tile, bool UNSIGNED, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::THREADS) linear_w4a4_kernel(Linear<T> p, Epilogue epilogue) {
  SHARED_DYNAMIC(shared);
  const Place<Tile> at{int(blockIdx.x) * Tile::BM, int(blockIdx.y) * Tile::BN, 0};
  Sums<Tile> acc = {};
  compute<UNSIGNED, Tile>(acc, shared, p, at);
  const auto visit = [&](float(&y)[VECTOR], int, int row, int column) {
    const Cell cell = {at.m0 + row, at.n0 + column, at.m0 + row < p.in.M && at.n0 + column < p.in.N};
    if (cell.inside) add_bias(y, p.bias + cell.column);
    epilogue(y, cell);
  };
  visit_rows<Tile>(*reinterpret_cast<Slab<Tile>*>(shared), acc, at, visit, [](int) {});
}

}  // namespace nunchaku_py::cuda
