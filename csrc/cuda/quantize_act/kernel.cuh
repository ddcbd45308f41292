// quantize_act to INT4: codes and scales of x̂ = (x + shift)·inv_smooth, and h = x·downᵀ, from one read of x.
//
// A warp takes sixteen rows and every WARPS-th group of 64 columns. Of a row's group, thread t of four has columns 16t
// to 16t + 15, 32 bytes in one piece. mma may sum over k in any order, so down is dealt out alike, and neither passes
// through shared memory. The warps' parts of h are added in a fixed order: the same bits every time.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/memory.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/platform.cuh"
#include "cuda/common/scales.h"
#include "cuda/quantize_act/codes.cuh"

namespace nunchaku_py::cuda {

constexpr int OWN = 16;  // columns of a group that a thread has

template <class T>
struct QuantizeParams {
  const T* x;               // (M, K)
  const float* inv_smooth;  // (K)
  const T* down;            // (R, K)
  uint8_t* qx;              // (M, K/2)
  T* sx;                    // (G, scale_rows(M)), see scale_of_row
  float* h;                 // (M, R)
  float shift;
  int M, K, R;  // K a multiple of 64
  bool is_unsigned;
};

// Sixteen neighbours as eight pairs.
template <class T>
DEVICE void load_pairs(uint32_t (&to)[OWN / 2], const T* from, bool inside) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 four = inside ? ldg<uint4>(from + i * 8) : uint4{};
    to[i * 4] = four.x, to[i * 4 + 1] = four.y, to[i * 4 + 2] = four.z, to[i * 4 + 3] = four.w;
  }
}

template <class T>
DEVICE void widen(float (&to)[OWN], const uint32_t (&pairs)[OWN / 2]) {
#pragma unroll
  for (int i = 0; i < OWN / 2; ++i) {
    float two[2];
    cvt_f32x2<T>(two, pairs[i]);
    to[i * 2] = two[0], to[i * 2 + 1] = two[1];
  }
}

// ---- codes and scales -----------------------------------------------------------------------------------------------
template <class T>
DEVICE void quantize_row(const uint32_t (&pairs)[OWN / 2], const float (&inv_smooth)[OWN], const QuantizeParams<T>& p,
                         int row, int group, int t) {
  float x[OWN];
  widen<T>(x, pairs);
#pragma unroll
  for (int i = 0; i < OWN; ++i) x[i] = (x[i] + p.shift) * inv_smooth[i];
  const T stored = round_scale<T>(group_top<4>(x, p.is_unsigned) / (p.is_unsigned ? 15.f : 7.f));
  if (row >= p.M) return;
  const float scale = cvt_f32(stored);
  const uint2 codes = {codes_of(x, scale, p.is_unsigned), codes_of(x, scale, p.is_unsigned, 8)};
  stg(p.qx + size_t(row) * (p.K / 2) + group * (GROUP / 2) + t * 8, codes);
  if (t == 0) stg(p.sx + size_t(group) * scale_rows(p.M) + scale_of_row(row), stored);
}

// ---- h --------------------------------------------------------------------------------------------------------------
template <int RANKS, class T>
DEVICE void add_hidden(float (&h)[RANKS / 8][4], const uint32_t (&x)[2][OWN / 2], const QuantizeParams<T>& p, int rank0,
                       int column, int g) {
#pragma unroll
  for (int n = 0; n < RANKS / 8; ++n) {
    const int rank = rank0 + n * 8 + g;
    uint32_t down[OWN / 2];
    load_pairs(down, p.down + size_t(rank < p.R ? rank : 0) * p.K + column, rank < p.R);
#pragma unroll
    for (int i = 0; i < OWN / 2; i += 2) {
      const uint32_t a[4] = {x[0][i], x[1][i], x[0][i + 1], x[1][i + 1]}, b[2] = {down[i], down[i + 1]};
      mma_m16n8k16<T>(h[n], a, b);
    }
  }
}

// The warps' parts, summed in their order.
template <int RANKS, int WARPS, class T>
DEVICE void store_hidden(float* shared, const float (&h)[RANKS / 8][4], const QuantizeParams<T>& p, int row0,
                         int rank0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < RANKS / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sts(shared + (warp * 16 + g + i / 2 * 8) * RANKS + n * 8 + t * 2 + i % 2, h[n][i]);
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * RANKS; i += WARPS * 32) {
    const int row = row0 + i / RANKS, rank = rank0 + i % RANKS;
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += lds<float>(shared + w * 16 * RANKS + i);
    if (row < p.M && rank < p.R) stg(p.h + size_t(row) * p.R + rank, sum);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------
// What is quantized: x itself.
template <class T>
struct AsItIs {
  template <int WARPS>
  DEVICE void prepare(float*, const QuantizeParams<T>&, int) {}
  DEVICE void finish(uint32_t (&)[2][OWN / 2], const QuantizeParams<T>&, int, int) const {}
};

template <class T>
DEVICE void load_rows(uint32_t (&x)[2][OWN / 2], const QuantizeParams<T>& p, int row, int column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = row + i * 8 < p.M;
    load_pairs(x[i], p.x + size_t(inside ? row + i * 8 : 0) * p.K + column, inside);
  }
}

template <class T>
DEVICE void quantize_rows(const uint32_t (&x)[2][OWN / 2], const QuantizeParams<T>& p, int row, int group, int t) {
  float inv_smooth[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i += 4) {
    const float4 four = ldg<float4>(p.inv_smooth + group * GROUP + t * OWN + i);
    inv_smooth[i] = four.x, inv_smooth[i + 1] = four.y, inv_smooth[i + 2] = four.z, inv_smooth[i + 3] = four.w;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) quantize_row(x[i], inv_smooth, p, row + i * 8, group, t);
}

// Block (x, y) takes rows 16x … and ranks RANKS·y …; the codes are written by the first of the blocks of a row.
template <class T, int RANKS, int WARPS, class Source>
DEVICE void quantize_block(const QuantizeParams<T>& p, Source& source) {
  SHARED_DYNAMIC(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row = blockIdx.x * 16 + g, rank0 = blockIdx.y * RANKS;
  source.template prepare<WARPS>(reinterpret_cast<float*>(shared), p, row);
  float h[RANKS / 8][4] = {};
  for (int group = warp; group < p.K / GROUP; group += WARPS) {
    const int column = group * GROUP + t * OWN;
    uint32_t x[2][OWN / 2];
    load_rows(x, p, row, column);
    source.finish(x, p, row, column);
    add_hidden<RANKS>(h, x, p, rank0, column, g);
    if (blockIdx.y == 0) quantize_rows(x, p, row, group, t);
  }
  store_hidden<RANKS, WARPS>(reinterpret_cast<float*>(shared), h, p, blockIdx.x * 16, rank0);
}

template <class T, int RANKS, int WARPS, class Source>
__global__ void __launch_bounds__(WARPS * 32) quantize_act_kernel(QuantizeParams<T> p, Source source) {
  if constexpr (MULTIPLIES<T>) quantize_block<T, RANKS, WARPS>(p, source);
}

template <int RANKS, int WARPS>
constexpr int quantize_act_bytes() {
  return WARPS * 16 * RANKS * int(sizeof(float));
}

}  // namespace nunchaku_py::cuda
