// The endings that quantize to INT8 for the next linear. The scale is that of a whole row, of which a block has a part:
// so z = activation(y), or value·activation(gate), goes to memory in 16 bit, with the largest magnitude of each row of
// ẑ, and quantize_act reads it once more.
#pragma once
#include "cuda/linear/next_act.cuh"

namespace nunchaku_py::cuda {

template <class T, class Z>
struct Activated {
  T* z;         // (M, width)
  float* tops;  // (M): zero, and after the kernel max_k |z·inv_smooth|, NaN where that is not finite
  const float* inv_smooth;
  int M, width;
  Z make;

  // Four neighbours of a row, of which all threads of a warp hold some.
  DEVICE void operator()(float (&values)[VECTOR], Cell at) const {
    const uint2 rounded = {cvt_16bitx2<T>(values[0], values[1]), cvt_16bitx2<T>(values[2], values[3])};
    float x[VECTOR] = {};
    if (at.inside) {
      stg(z + size_t(at.row) * width + at.column, rounded);
      from_16bit<T>(x, rounded);
      const float4 by = ldg<float4>(inv_smooth + at.column);
      x[0] *= by.x, x[1] *= by.y, x[2] *= by.z, x[3] *= by.w;
    }
    const float top = group_top<32>(x, false);
    if (this_thread() % 32 == 0 && at.row < M) atomic_max(tops + at.row, top);
  }
};

template <class Tile, class T, class Z>
DEVICE void finish_activated(const Sums<Tile>& y, void* shared, const Part<T, Activated<T, Z>>& part, Corner corner) {
  const Linear<T>& p = part.linear;
  const auto visit = [&](float (&z)[VECTOR], int, int row, int column) {
    const int of_z = corner.n0 + column;
    const bool exists = column < Z::WIDTH && of_z < part.ending.width;
    if (corner.channel(column) < p.in.N) add_bias(z, p.bias + corner.channel(column));
    part.ending.make(z);
    part.ending(z, {corner.m0 + row, of_z, corner.m0 + row < p.in.M && exists});
  };
  visit_rows<Tile>(*static_cast<Slab<Tile>*>(shared), y, corner, visit, [](int) {});
}

// Block (x, y) takes the rows of its turn, and columns y·WIDTH … of z.
template <class Tile, class Numbers, class T, class Z>
__global__ void __launch_bounds__(Tile::THREADS, BLOCKS<Tile>)
    linear_activated_kernel(Group<T, Activated<T, Z>> group) {
  if constexpr (BUILT<Tile, Numbers, T>) {
    SHARED_DYNAMIC(shared);
    const int n0 = int(blockIdx.y) * Z::WIDTH;
    Sums<Tile, typename Numbers::Sum> sums = {};
    {
      const Turn turn = turn_of_block<Tile>(group);
      const Part<T, Activated<T, Z>>& part = group.parts[turn.part];
      if (n0 >= part.ending.width) return;
      multiply<Tile, Numbers>(sums, buffers<Tile, Numbers>(shared), part.linear.in, {turn.m0, n0, part.linear.in.jump});
    }
    const Turn turn = turn_of_block<Tile>(group);
    const Part<T, Activated<T, Z>>& part = group.parts[turn.part];
    const Corner corner = {turn.m0, n0, part.linear.in.jump};
    Sums<Tile> y;
    complete<Tile, Numbers>(y, sums, part.linear, corner);
    finish_activated<Tile>(y, shared, part, corner);
  }
}

}  // namespace nunchaku_py::cuda
