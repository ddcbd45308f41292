// quantize_act: codes and scales of x̂ = (x + shift)·inv_smooth, and h = x·downᵀ, from one read of x; to INT8, whose
// scale is that of the whole row, from two, of which the second finds x in the cache.
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
  Quantizing out;
  const T* x;               // (M, K)
  const float* inv_smooth;  // (K)
  const T* down;            // (R, K)
  float* h;                 // (M, R)
  const float* tops;        // (M), or null: see InRows
  float shift;
  int R;
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

DEVICE void load_floats(float (&to)[OWN], const float* from) {
#pragma unroll
  for (int i = 0; i < OWN; i += 4) {
    const float4 four = ldg<float4>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// x̂ of sixteen neighbours.
template <class T>
DEVICE void smoothed(float (&to)[OWN], const uint32_t (&pairs)[OWN / 2], const float (&inv_smooth)[OWN], float shift) {
  widen<T>(to, pairs);
#pragma unroll
  for (int i = 0; i < OWN; ++i) to[i] = (to[i] + shift) * inv_smooth[i];
}

// ---- h --------------------------------------------------------------------------------------------------------------
template <int RANKS, class T>
DEVICE void add_hidden(float (&h)[RANKS / 8][4], const uint32_t (&x)[2][OWN / 2], const QuantizeParams<T>& p, int rank0,
                       int column, int g) {
#pragma unroll
  for (int n = 0; n < RANKS / 8; ++n) {
    const int rank = rank0 + n * 8 + g;
    uint32_t down[OWN / 2];
    load_pairs(down, p.down + size_t(rank < p.R ? rank : 0) * p.out.K + column, rank < p.R);
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
    if (row < p.out.M && rank < p.R) stg(p.h + size_t(row) * p.R + rank, sum);
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
    const bool inside = row + i * 8 < p.out.M;
    load_pairs(x[i], p.x + size_t(inside ? row + i * 8 : 0) * p.out.K + column, inside);
  }
}

// ---- codes and scales -----------------------------------------------------------------------------------------------
// visit(x̂, i, row) of the two rows that a thread has a part of.
template <class T, class Visit>
DEVICE void visit_smoothed(const uint32_t (&pairs)[2][OWN / 2], const QuantizeParams<T>& p, int row, int column,
                           Visit visit) {
  float inv_smooth[OWN];
  load_floats(inv_smooth, p.inv_smooth + column);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float x[OWN];
    smoothed<T>(x, pairs[i], inv_smooth, p.shift);
    visit(x, i, row + i * 8);
  }
}

// Codes whose scale is that of a group, which the threads at hand hold.
template <class To>
struct InGroups {
  static constexpr bool BUILT = To::BUILT;

  template <int WARPS, class T, class Source>
  DEVICE void prepare(float*, const QuantizeParams<T>&, const Source&, int) {}

  template <class T>
  DEVICE void store(const uint32_t (&pairs)[2][OWN / 2], const QuantizeParams<T>& p, int row, int column) const {
    visit_smoothed(pairs, p, row, column,
                   [&](const float (&x)[OWN], int, int of) { To::store(p.out, x, of, column, of < p.out.M); });
  }
};

// INT8 codes, whose scale is that of the row. GIVEN: who made x has left its rows' tops.
template <bool GIVEN>
struct InRows {
  static constexpr bool BUILT = true;
  float scale[2];  // of rows g and g + 8

  template <int WARPS, class T, class Source>
  DEVICE void prepare(float* shared, const QuantizeParams<T>& p, const Source& source, int row) {
    float tops[2] = {};
    if constexpr (GIVEN)
      for (int i = 0; i < 2; ++i) tops[i] = row + i * 8 < p.out.M ? ldg<float>(p.tops + row + i * 8) : 0.f;
    else
      find_tops<WARPS>(tops, shared, p, source, row);
    for (int i = 0; i < 2; ++i) scale[i] = tops[i] / 127.f;
    if (blockIdx.y > 0 || threadIdx.x / 32 > 0 || threadIdx.x % 4 > 0) return;
    for (int i = 0; i < 2; ++i)
      if (row + i * 8 < p.out.M) stg(static_cast<float*>(p.out.sx) + row + i * 8, scale[i]);
  }

  template <class T>
  DEVICE void store(const uint32_t (&pairs)[2][OWN / 2], const QuantizeParams<T>& p, int row, int column) const {
    visit_smoothed(pairs, p, row, column, [&](const float (&x)[OWN], int i, int of) {
      if (of >= p.out.M) return;
      const uint4 codes = {codes_of<8, 4>(x, scale[i], -127, 127), codes_of<8, 4>(x, scale[i], -127, 127, 4),
                           codes_of<8, 4>(x, scale[i], -127, 127, 8), codes_of<8, 4>(x, scale[i], -127, 127, 12)};
      stg(p.out.qx + size_t(of) * p.out.K + column, codes);
    });
  }

 private:
  template <int WARPS, class T, class Source>
  DEVICE static void find_tops(float (&tops)[2], float* shared, const QuantizeParams<T>& p, const Source& source,
                               int row) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    for (int group = warp; group < p.out.K / GROUP; group += WARPS) {
      uint32_t pairs[2][OWN / 2];
      load_rows(pairs, p, row, group * GROUP + t * OWN);
      source.finish(pairs, p, row, group * GROUP + t * OWN);
      visit_smoothed(pairs, p, row, group * GROUP + t * OWN,
                     [&](const float (&x)[OWN], int i, int) { tops[i] = larger(tops[i], group_top<1>(x, false)); });
    }
    for (int i = 0; i < 2; ++i) {
      for (int lanes = 1; lanes < 4; lanes *= 2) tops[i] = larger(tops[i], shfl_xor(tops[i], lanes));
      if (t == 0) sts(shared + (i * WARPS + warp) * 8 + g, tops[i]);
    }
    __syncthreads();
    for (int i = 0; i < 2; ++i)
      for (int w = 0; w < WARPS; ++w) tops[i] = larger(tops[i], lds<float>(shared + (i * WARPS + w) * 8 + g));
    __syncthreads();  // shared is used again
  }
};

// Block (x, y) takes rows 16x … and ranks RANKS·y …; the codes are written by the first of the blocks of a row.
template <class T, int RANKS, int WARPS, class Source, class Codes>
DEVICE void quantize_block(const QuantizeParams<T>& p, Source& source) {
  SHARED_DYNAMIC(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row = blockIdx.x * 16 + g, rank0 = blockIdx.y * RANKS;
  source.template prepare<WARPS>(reinterpret_cast<float*>(shared), p, row);
  Codes codes;
  codes.template prepare<WARPS>(reinterpret_cast<float*>(shared), p, source, row);
  float h[RANKS / 8][4] = {};
  for (int group = warp; group < p.out.K / GROUP; group += WARPS) {
    const int column = group * GROUP + t * OWN;
    uint32_t x[2][OWN / 2];
    load_rows(x, p, row, column);
    source.finish(x, p, row, column);
    add_hidden<RANKS>(h, x, p, rank0, column, g);
    if (blockIdx.y == 0) codes.store(x, p, row, column);
  }
  store_hidden<RANKS, WARPS>(reinterpret_cast<float*>(shared), h, p, blockIdx.x * 16, rank0);
}

template <class T, int RANKS, int WARPS, class Source, class Codes>
__global__ void __launch_bounds__(WARPS * 32, 1) quantize_act_kernel(QuantizeParams<T> p, Source source) {
  if constexpr (MULTIPLIES<T> && Codes::BUILT) quantize_block<T, RANKS, WARPS, Source, Codes>(p, source);
}

template <int RANKS, int WARPS>
constexpr int quantize_act_bytes() {
  return WARPS * 16 * RANKS * int(sizeof(float));
}

}  // namespace nunchaku_py::cuda
