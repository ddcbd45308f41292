// The epilogues that end in the next linear's input: z = activation(y), or value·activation(gate), quantized, with the
// next linear's h = z·next_downᵀ. The 16-bit z never reaches memory.
//
// A block goes over neighbouring tiles of the same rows and adds up its part of h; the blocks' parts are summed in
// their order by a kernel of its own (sum_hidden). No atomics: a launch gives the same bits every time.
#pragma once
#include "cuda/arguments.h"
#include "cuda/linear/kernel.cuh"
#include "cuda/quantize_act/codes.cuh"

namespace nunchaku_py::cuda {

DEVICE float activate(float v, Activation kind) {
  switch (kind) {
    case Activation::gelu_tanh:
      return 0.5f * v * (1.f + tanhf(0.7978845608f * fmaf(0.044715f * v * v, v, v)));
    case Activation::gelu:
      return 0.5f * v * (1.f + erff(v * 0.7071067812f));
    case Activation::silu:
      return v / (1.f + expf(-v));
    default:
      return v;
  }
}

// How z is quantized, and where that goes.
template <class T>
struct NextAct {
  Quantizing out;           // M and K of z
  const float* inv_smooth;  // (K)
  const T* down;            // (R, K)
  float* parts;             // (blocks of columns, M, R): what sum_hidden makes h of
  float shift;
  int R;  // a multiple of 8
};

// Four neighbours of z, of which so many threads hold a group: codes and scale as quantize_act makes them.
template <class To, class T>
DEVICE void quantize_four(const NextAct<T>& next, const float (&z)[VECTOR], Cell at) {
  float x[VECTOR] = {};
  if (at.inside) {
    const float4 by = ldg<float4>(next.inv_smooth + at.column);
    x[0] = (z[0] + next.shift) * by.x, x[1] = (z[1] + next.shift) * by.y;
    x[2] = (z[2] + next.shift) * by.z, x[3] = (z[3] + next.shift) * by.w;
  }
  To::store(next.out, x, at.row, at.column, at.inside);
}

// ---- h --------------------------------------------------------------------------------------------------------------
// A slab of z in 16 bit, beside the slab of floats.
template <class Tile, class T>
struct Hidden {
  static constexpr int PITCH = Tile::BN + 8;  // ldmatrix meets no bank twice
  alignas(16) T z[Slab<Tile>::ROWS * PITCH];
};

template <class T>
DEVICE void load_sums(float (&to)[4], const float* row, const float* later, bool inside, bool and_later) {
  const float2 one = inside ? ldg<float2>(row) : float2{}, two = and_later ? ldg<float2>(later) : float2{};
  to[0] = one.x, to[1] = one.y, to[2] = two.x, to[3] = two.y;
}

// This block's part of h grows by a slab's z·downᵀ, WIDTH columns of z from at.n0 on. Each warp takes every WARPS-th
// piece of sixteen rows and eight ranks.
template <int WIDTH, class Tile, class T>
DEVICE void add_hidden(const Hidden<Tile, T>& slab, const NextAct<T>& next, float* part, int m, bool first,
                       const Place<Tile>& at) {
  constexpr int PIECES = Slab<Tile>::ROWS / 16, PITCH = Hidden<Tile, T>::PITCH;
  for (int i = at.warp; i < PIECES * (next.R / 8); i += Tile::WARPS) {
    const int rows = i % PIECES * 16, rank = i / PIECES * 8;
    float h[4] = {};
    float* to[2];
    bool inside[2];
    for (int j = 0; j < 2; ++j) {
      const int row = at.m0 + row_of_slab<Tile>(m, rows + at.g + j * 8);
      inside[j] = row < next.out.M;
      to[j] = part + size_t(inside[j] ? row : 0) * next.R + rank + at.t * 2;
    }
    if (!first) load_sums<T>(h, to[0], to[1], inside[0], inside[1]);
    const T* down = next.down + size_t(rank + at.g) * next.out.K + at.n0 + at.t * 2;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
      uint32_t z[4];
      ldmatrix_x4(z, slab.z + (rows + at.lane % 16) * PITCH + k + at.lane / 16 * 8);
      const bool there = at.n0 + k < next.out.K;
      const uint32_t by[2] = {there ? ldg<uint32_t>(down + k) : 0, there ? ldg<uint32_t>(down + k + 8) : 0};
      mma_m16n8k16<T>(h, z, by);
    }
    for (int j = 0; j < 2; ++j)
      if (inside[j]) stg(to[j], float2{h[j * 2], h[j * 2 + 1]});
  }
}

// h = the parts, added in their order.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) sum_hidden_kernel(const float* parts, int count, float* h, int size) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int part = 0; part < count; ++part) sum += ldg<float>(parts + size_t(part) * size + i);
  stg(h + i, sum);
}

// ---- z --------------------------------------------------------------------------------------------------------------
// z = activation(y): a tile of y gives as many columns of z.
template <class Tile>
struct Plain {
  static constexpr int WIDTH = Tile::BN;  // columns of z
  static constexpr int width_of(int n) { return n; }
  static constexpr int jump_of(int) { return 0; }  // Operands::jump
  Activation activation;
  bool gate_first;  // there is no gate
  DEVICE void operator()(float (&z)[VECTOR]) const {
    for (float& v : z) v = activate(v, activation);
  }
};

// z = value·activation(gate): a tile of y is 64 columns of one and 64 of the other, which half the threads hold each.
template <class Tile>
struct Gated {
  static constexpr int WIDTH = Tile::BN / 2;
  static_assert(Tile::BN == 2 * GROUP, "value and gate are a group each");
  static constexpr int width_of(int n) { return n / 2; }
  static constexpr int jump_of(int n) { return n / 2 - GROUP; }
  Activation activation;
  bool gate_first;
  DEVICE void operator()(float (&z)[VECTOR]) const {
    const bool has_gate = (this_thread() % 32 >= 16) != gate_first;
    for (float& v : z) {
      const float other = shfl_xor(v, 16);
      v = (has_gate ? other : v) * activate(has_gate ? v : other, activation);
    }
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------
template <class T, class Z>
struct Quantized {
  NextAct<T> next;
  Z make;
  int tiles;  // neighbouring ones, that a block goes over
};

// What follows a tile's sums: z from column corner.n0 on; it is the first or a later one of the block's.
template <class To, class Tile, class T, class Z>
DEVICE void finish_next(const Sums<Tile>& y, unsigned char* shared, const Part<T, Quantized<T, Z>>& part, Corner corner,
                        bool first) {
  const Linear<T>& p = part.linear;
  const NextAct<T>& next = part.ending.next;
  auto& hidden = *reinterpret_cast<Hidden<Tile, T>*>(shared + sizeof(Slab<Tile>));
  const auto visit = [&](float (&z)[VECTOR], int i, int row, int column) {
    const int of_z = corner.n0 + column;
    const bool exists = column < Z::WIDTH && of_z < next.out.K;
    const Cell cell = {corner.m0 + row, of_z, corner.m0 + row < next.out.M && exists};
    if (corner.channel(column) < p.in.N) add_bias(z, p.bias + corner.channel(column));
    part.ending.make(z);
    const uint2 rounded = {cvt_16bitx2<T>(z[0], z[1]), cvt_16bitx2<T>(z[2], z[3])};
    from_16bit<T>(z, rounded);
    // Beyond the end is whatever a clamped channel gives: it must not meet down's zeros, as infinity would.
    sts(hidden.z + i * Hidden<Tile, T>::PITCH + column, exists ? rounded : uint2{});
    quantize_four<To>(next, z, cell);
  };
  const auto visited = [&](int m) {
    __syncthreads();
    float* const hidden_part = next.parts + size_t(blockIdx.y) * next.out.M * next.R;
    add_hidden<Z::WIDTH>(hidden, next, hidden_part, m, first, Place<Tile>{corner});
  };
  visit_rows<Tile>(*reinterpret_cast<Slab<Tile>*>(shared), y, corner, visit, visited);
}

// Block (x, y) takes the rows of its turn, and every one of `tiles` neighbouring tiles from y·tiles on.
template <class Tile, class Numbers, class T, class Z>
__global__ void __launch_bounds__(Tile::THREADS, BLOCKS<Tile>) linear_next_kernel(Group<T, Quantized<T, Z>> group) {
  if constexpr (BUILT<Tile, Numbers, T>) {
    SHARED_DYNAMIC(shared);
    for (int i = 0;; ++i) {
      Sums<Tile, typename Numbers::Sum> sums = {};
      {
        const Turn turn = turn_of_block<Tile>(group);
        const Part<T, Quantized<T, Z>>& part = group.parts[turn.part];
        const int tile = blockIdx.y * part.ending.tiles + i;
        if (i == part.ending.tiles || tile * Z::WIDTH >= part.ending.next.out.K) return;
        __syncthreads();  // what the last tile left in shared memory is read
        multiply<Tile, Numbers>(sums, buffers<Tile, Numbers>(shared), part.linear.in,
                                {turn.m0, tile * Z::WIDTH, part.linear.in.jump});
      }
      const Turn turn = turn_of_block<Tile>(group);
      const Part<T, Quantized<T, Z>>& part = group.parts[turn.part];
      const int tile = blockIdx.y * part.ending.tiles + i;
      const Corner corner = {turn.m0, tile * Z::WIDTH, part.linear.in.jump};
      Sums<Tile> y;
      complete<Tile, Numbers>(y, sums, part.linear, corner);
      finish_next<typename Numbers::To, Tile>(y, shared, part, corner, i == 0);
    }
  }
}

}  // namespace nunchaku_py::cuda
