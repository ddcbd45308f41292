// linear_w4a8 on Hopper as one kernel: main loop, scales, low-rank branch, bias, epilogue. Clusters stay until all
// tiles are done.
//
// What a warp has of y is 16 rows of all the tile's channels. Eight rows and 128 channels at a time pass through shared
// memory of its own, so that each thread sees four neighbouring channels, and epilogues are those of every other
// kernel.
#pragma once
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear_w4a8/activated.cuh"
#include "cuda/linear_w4a8/mainloop_sm90.cuh"

namespace nunchaku_py::cuda {

constexpr int SLAB_ROWS = 8, SLAB_COLUMNS = 128, SLAB_PITCH = SLAB_COLUMNS + 8;  // no bank conflicts

template <class Tile>
struct SharedSm90 {
  static constexpr int WARPS = 4 * Tile::MULTIPLYING;
  RingSm90<Tile> ring;
  alignas(16) float slabs[WARPS][SLAB_ROWS * SLAB_PITCH];
  static_assert(2 * Tile::BN <= SLAB_ROWS * SLAB_PITCH, "scales and bias wait in the slab");
};

// ---- y --------------------------------------------------------------------------------------------------------------
// As a thread has it: of rows `row` and row + 8, channels 8n + 2t and 8n + 2t + 1.
//
// Scales and bias of the tile's channels wait in a warp's slab until that is wanted: read from global memory where they
// are used, they would all be under way at a time, and leave no registers for y. Zero beyond the end. The second half of
// the channels lies `jump` further.
template <class Tile>
DEVICE void load_channels(float* slab, const Operands& in, const float* bias, int n0) {
#pragma unroll
  for (int column = threadIdx.x % 32 * 4; column < Tile::BN; column += 128) {
    const int channel = n0 + column + (column >= Tile::BN / 2 ? in.jump : 0);
    const bool inside = channel < in.N;
    sts(slab + column, inside ? ldg<float4>(in.channel_scales + channel) : float4{});
    sts(slab + Tile::BN + column, inside ? ldg<float4>(bias + channel) : float4{});
  }
  __syncwarp();
}

template <class Tile>
DEVICE void scale(float (&y)[Tile::SUMS], const int (&sums)[Tile::SUMS], const Operands& in, const float* slab,
                  int row) {
  float rows[2];
  for (int i = 0; i < 2; ++i) rows[i] = row + i * 8 < in.M ? ldg<float>(in.row_scales + row + i * 8) : 0.f;
#pragma unroll
  for (int n = 0; n < Tile::SUMS; n += 4) {
    const float2 by = lds<float2>(slab + n * 2 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[n + i] = cvt_f32(sums[n + i]) * rows[i / 2] * (i % 2 ? by.y : by.x);
  }
}

template <class Tile>
DEVICE void add_bias(float (&y)[Tile::SUMS], const float* slab) {
#pragma unroll
  for (int n = 0; n < Tile::SUMS; n += 4) {
    const float2 by = lds<float2>(slab + Tile::BN + n * 2 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[n + i] += i % 2 ? by.y : by.x;
  }
}

// ---- what becomes of it ---------------------------------------------------------------------------------------------
// How endings make z of y: like Plain and Gated, but value and gate are registers of one thread.
struct PlainSm90 {
  static constexpr int PARTS = 1;  // columns of y for one of z
  Activation activation;
  bool gate_first;  // there is no gate
  template <int SUMS>
  DEVICE void operator()(float (&y)[SUMS]) const {
#pragma unroll
    for (float& v : y) v = activate(v, activation);
  }
};

struct GatedSm90 {
  static constexpr int PARTS = 2;
  Activation activation;
  bool gate_first;
  template <int SUMS>
  DEVICE void operator()(float (&y)[SUMS]) const {
#pragma unroll
    for (int i = 0; i < SUMS / 2; ++i) {
      const float first = y[i], second = y[i + SUMS / 2];
      y[i] = (gate_first ? second : first) * activate(gate_first ? first : second, activation);
    }
  }
};

// Columns of y for one of what an ending takes, and how that is made.
template <class Ending>
constexpr int PARTS_OF = 1;
template <class T, class Z>
constexpr int PARTS_OF<Activated<T, Z>> = Z::PARTS;

template <int SUMS, class Ending>
DEVICE void make(float (&)[SUMS], const Ending&) {}
template <int SUMS, class T, class Z>
DEVICE void make(float (&y)[SUMS], const Activated<T, Z>& ending) {
  ending.make(y);
}

// WIDTH columns of the tile to `ending`, from column n0 of `columns` on.
template <int WIDTH, int SUMS, class Ending>
DEVICE void visit_tile(const float (&y)[SUMS], float* slab, int row0, int rows, int n0, int columns,
                       const Ending& ending) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int part = 0; part < WIDTH; part += SLAB_COLUMNS) {
      __syncwarp();  // the last piece is read
#pragma unroll
      for (int n = part / 8; n < (part + SLAB_COLUMNS) / 8 && n < WIDTH / 8; ++n)
        sts(slab + g * SLAB_PITCH + n * 8 - part + t * 2, float2{y[n * 4 + i * 2], y[n * 4 + i * 2 + 1]});
      __syncwarp();
#pragma unroll 2
      for (int r = 0; r < SLAB_ROWS; ++r) {
        const int row = row0 + i * 8 + r, column = part + lane * 4;
        const float4 found = column < WIDTH ? lds<float4>(slab + r * SLAB_PITCH + lane * 4) : float4{};
        float values[VECTOR] = {found.x, found.y, found.z, found.w};
        ending(values, {row, n0 + column, row < rows && column < WIDTH && n0 + column < columns});
      }
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------
template <class Tile, class T, class Ending>
DEVICE void multiply_item(SharedSm90<Tile>& shared, Turning<Tile>& turn, const PartSm90<T, Ending>& part,
                          const Item& item) {
  const Operands& in = part.linear.in;
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
  const int row0 = item.m0 + warp * 16, row = row0 + threadIdx.x % 32 / 4;
  float* const slab = shared.slabs[warp];
  __syncwarp();  // the last item's is read
  float y[Tile::SUMS];
  {
    int sums[Tile::SUMS] = {};
    load_channels<Tile>(slab, in, part.linear.bias, item.n0);
    multiply<Tile>(sums, shared.ring, turn, in.steps, group);
    scale<Tile>(y, sums, in, slab, row);
  }
  add_low_rank<Tile>(y, shared.ring, turn, part.linear.branch, row, in.M);
  add_bias<Tile>(y, slab);
  make(y, part.ending);
  constexpr int COLUMNS = PARTS_OF<Ending>;
  visit_tile<Tile::BN / COLUMNS>(y, slab, row0, in.M, item.n0, in.N / COLUMNS, part.ending);
}

template <class Tile, class T, class Ending>
__global__ void __launch_bounds__(Tile::THREADS, 1)
    linear_w4a8_sm90_kernel(const __grid_constant__ GroupSm90<T, Ending> group) {
  if constexpr (HOPPER) {
    constexpr int WIDTH = Tile::BN / PARTS_OF<Ending>;
    static_assert(sizeof(SharedSm90<Tile>) <= SM90_MOST_SHARED, "a block has 227 KB of shared memory at most");
    SHARED_DYNAMIC(bytes);
    auto& shared = *reinterpret_cast<SharedSm90<Tile>*>(bytes);
    if (threadIdx.x == 0) make_barriers<Tile>(shared.ring);
    cluster_sync();
    const int begin = blockIdx.x / Tile::CLUSTER, step = gridDim.x / Tile::CLUSTER;
    Turning<Tile> turn;
    if (threadIdx.x < 128) {
      fewer_registers<40>();
      if (threadIdx.x == 0)
        for (int i = begin; i < group.items; i += step) {
          const Item item = item_of<Tile, WIDTH>(group, i);
          copy_item(shared.ring, turn, group.parts[item.part], item);
        }
    } else {
      more_registers<232>();
      for (int i = begin; i < group.items; i += step) {
        const Item item = item_of<Tile, WIDTH>(group, i);
        multiply_item<Tile>(shared, turn, group.parts[item.part], item);
      }
    }
    cluster_sync();  // nobody writes into a block, or arrives there, that is gone
  }
}

}  // namespace nunchaku_py::cuda
