// linear_w4a16 for many rows, on the tensor cores: a block decodes 64 channels once for its 64 rows. The next 64 inputs
// come through registers, and are decoded on the way to shared memory, while some are multiplied.
#pragma once
#include "cuda/linear/kernel.cuh"
#include "cuda/linear_w4a16/decode.cuh"

namespace nunchaku_py::cuda {

using ManyTile = Tile<64, 64, 32, 32, 2>;
constexpr int INPUTS = 64, INPUTS_PITCH = INPUTS + 8;  // ldmatrix meets no bank twice
constexpr int ROW_CHUNKS = INPUTS / 8;                 // of 16 bytes, of x

template <class T>
struct alignas(16) Inputs {
  T x[ManyTile::BM * INPUTS_PITCH], w[ManyTile::BN * INPUTS_PITCH];
};

// What a thread has of inputs on their way: every THREADS-th chunk of x, and half of a channel's weights.
struct CarriedInputs {
  static constexpr int X = ManyTile::BM * ROW_CHUNKS / ManyTile::THREADS;
  static_assert(ManyTile::BN * INPUTS == ManyTile::THREADS * OWN_WEIGHTS, "a thread has 32 weights");
  uint4 x[X], codes;
  Grid grid;
};

// Beyond the end of rows, channels or inputs everything is zero.
template <bool SIGNED, class T>
DEVICE CarriedInputs load_inputs(const Decoded<T>& p, Corner corner, int k) {
  CarriedInputs carried = {};
#pragma unroll
  for (int i = 0; i < carried.X; ++i) {
    const int chunk = threadIdx.x + i * ManyTile::THREADS;
    const int row = corner.m0 + chunk / ROW_CHUNKS, column = k + chunk % ROW_CHUNKS * 8;
    if (row < p.M && column < p.K) carried.x[i] = ldg<uint4>(p.x + size_t(row) * p.K + column);
  }
  const int channel = corner.n0 + threadIdx.x / 2, column = k + threadIdx.x % 2 * OWN_WEIGHTS;
  if (channel < p.N && column < p.K) {
    const size_t of = size_t(channel) * ((p.K + p.group - 1) / p.group) + column / p.group;
    carried.codes = ldg<uint4>(p.qw + size_t(channel) * (p.K / 2) + column / 2);
    carried.grid = {cvt_f32(ldg<T>(p.scales + of)), SIGNED ? 0.f : cvt_f32(ldg<T>(p.zeros + of))};
  }
  return carried;
}

template <bool SIGNED, class T>
DEVICE void store_inputs(Inputs<T>& to, const CarriedInputs& carried) {
#pragma unroll
  for (int i = 0; i < carried.X; ++i) {
    const int chunk = threadIdx.x + i * ManyTile::THREADS;
    sts(to.x + chunk / ROW_CHUNKS * INPUTS_PITCH + chunk % ROW_CHUNKS * 8, carried.x[i]);
  }
  T* const w = to.w + threadIdx.x / 2 * INPUTS_PITCH + threadIdx.x % 2 * OWN_WEIGHTS;
  const uint32_t words[4] = {carried.codes.x, carried.codes.y, carried.codes.z, carried.codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float eight[8];
    decode_eight<T, SIGNED>(eight, words[i], carried.grid);
    sts(w + i * 8, uint4{cvt_16bitx2<T>(eight[0], eight[1]), cvt_16bitx2<T>(eight[2], eight[3]),
                         cvt_16bitx2<T>(eight[4], eight[5]), cvt_16bitx2<T>(eight[6], eight[7])});
  }
}

template <class T>
DEVICE void multiply_inputs(Sums<ManyTile>& acc, const Inputs<T>& from, const Place<ManyTile>& at) {
  const T* const rows = from.x + (at.row + at.lane % 16) * INPUTS_PITCH + at.lane / 16 * 8;
  const T* const channels = from.w + (at.column + at.lane / 16 * 8 + at.lane % 8) * INPUTS_PITCH + at.lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < INPUTS; k += 16) {
    uint32_t x[ManyTile::MT][4];
#pragma unroll
    for (int m = 0; m < ManyTile::MT; ++m) ldmatrix_x4(x[m], rows + m * 16 * INPUTS_PITCH + k);
#pragma unroll
    for (int n = 0; n < ManyTile::NT; n += 2) {
      uint32_t w[4];  // of two fragments
      ldmatrix_x4(w, channels + n * 8 * INPUTS_PITCH + k);
#pragma unroll
      for (int m = 0; m < ManyTile::MT; ++m) {
        mma_m16n8k16<T>(acc[m][n], x[m], {w[0], w[1]});
        mma_m16n8k16<T>(acc[m][n + 1], x[m], {w[2], w[3]});
      }
    }
  }
}

template <bool SIGNED, class T>
DEVICE void multiply_decoded(Sums<ManyTile>& acc, Inputs<T> (&stages)[2], const Decoded<T>& p, Corner corner) {
  const Place<ManyTile> at{corner};
  store_inputs<SIGNED>(stages[0], load_inputs<SIGNED>(p, corner, 0));
#pragma unroll 1
  for (int k = 0, stage = 0; k < p.K; k += INPUTS, stage = 1 - stage) {
    __syncthreads();  // the stage is there for all, and nobody reads any more what is filled after it
    const bool more = k + INPUTS < p.K;
    CarriedInputs carried;
    if (more) carried = load_inputs<SIGNED>(p, corner, k + INPUTS);
    multiply_inputs(acc, stages[stage], at);
    if (more) store_inputs<SIGNED>(stages[1 - stage], carried);
  }
}

constexpr int many_rows_bytes() {
  return 2 * sizeof(Inputs<f16>);  // more than the slab of the epilogue takes
}
static_assert(many_rows_bytes() >= int(sizeof(Slab<ManyTile>)));

// p.R a multiple of 16
template <class T, bool SIGNED>
__global__ void __launch_bounds__(ManyTile::THREADS) many_rows_kernel(Decoded<T> p) {
  if constexpr (MULTIPLIES<T>) {
    SHARED_DYNAMIC(shared);
    const Corner corner = {int(blockIdx.x) * ManyTile::BM, int(blockIdx.y) * ManyTile::BN, 0};
    Sums<ManyTile> acc = {};
    multiply_decoded<SIGNED>(acc, *reinterpret_cast<Inputs<T>(*)[2]>(shared), p, corner);
    const Operands sizes = {.M = p.M, .N = p.N};
    const Part<T, Store<T>> part = {{sizes, {p.h, p.up, p.R}, p.bias}, {p.y, p.N}};
    add_low_rank<ManyTile>(acc, part.linear.branch, p.M, p.N, corner);
    finish<ManyTile>(acc, shared, part, corner);
  }
}

}  // namespace nunchaku_py::cuda
