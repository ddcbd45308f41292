// One tiny kernel per instruction, registers in and out by lane. The host runs them (instructions.cpp), nvcc compiles
// them (probes.cu). A kernel is empty for targets that lack its instruction.
#pragma once
#include "cuda/common/approx.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/cp_async.cuh"
#include "cuda/common/ldmatrix.cuh"
#include "cuda/common/memory.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/warp.cuh"

namespace nunchaku_py::cuda {

template <int N, class T>
DEVICE void load_registers(T (&to)[N], const T* from) {
  for (int i = 0; i < N; ++i) to[i] = ldg<T>(from + threadIdx.x * N + i);
}

template <int N, class T>
DEVICE void store_registers(T* to, const T (&from)[N]) {
  for (int i = 0; i < N; ++i) stg(to + threadIdx.x * N + i, from[i]);
}

// ---- mma ------------------------------------------------------------------------------------------------------------
// X(instruction, type of a sum, registers of C, A and B, least target that has it, what else it is called with)
#define FOR_EACH_MMA(X)                              \
  X(mma_m8n8k32_s4, int, 2, 1, 1, 75)                \
  X(mma_m8n8k32_s4_from, int, 2, 1, 1, 75, start)    \
  X(mma_m8n8k32_u4s4, int, 2, 1, 1, 75)              \
  X(mma_m8n8k32_u4s4_from, int, 2, 1, 1, 75, start)  \
  X(mma_m16n8k64_s4, int, 4, 4, 2, 80)               \
  X(mma_m16n8k64_s4_from, int, 4, 4, 2, 80, start)   \
  X(mma_m16n8k64_u4s4, int, 4, 4, 2, 80)             \
  X(mma_m16n8k64_u4s4_from, int, 4, 4, 2, 80, start) \
  X(mma_m8n8k16_s8, int, 2, 1, 1, 75)                \
  X(mma_m16n8k32_s8, int, 4, 4, 2, 80)               \
  X(mma_m16n8k8_f16, float, 4, 2, 1, 75)             \
  X(mma_m16n8k16_f16, float, 4, 4, 2, 80)            \
  X(mma_m16n8k16_bf16, float, 4, 4, 2, 80)

// run is a template so that a target below LEAST, which does not call it, does not compile it either.
#define PROBE_MMA(name, sum, nc, na, nb, least, ...)                                   \
  struct probe_##name {                                                                \
    using Sum = sum;                                                                   \
    static constexpr int NC = nc, NA = na, NB = nb, LEAST = least;                     \
    template <class C, class A, class B>                                               \
    DEVICE static void run(C& c, const A& a, const B& b, [[maybe_unused]] int start) { \
      name(c, a, b __VA_OPT__(, ) __VA_ARGS__);                                        \
    }                                                                                  \
  };
FOR_EACH_MMA(PROBE_MMA)

struct probe_mma_m16n8k64_nvf4 {  // the scales come after A and B
  using Sum = float;
  static constexpr int NC = 4, NA = 5, NB = 3, LEAST = 120;
  template <class C, class A, class B>
  DEVICE static void run(C& c, const A& a, const B& b, int) {
    mma_m16n8k64_nvf4<0, 0>(c, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, a[4], b[2]);
  }
};

struct probe_mma_m16n8k64_nvf4_selected : probe_mma_m16n8k64_nvf4 {  // by pair·4 + lane
  template <int SELECTED = 0, class C, class A, class B>
  DEVICE static void run(C& c, const A& a, const B& b, int selected) {
    if (selected == SELECTED)
      mma_m16n8k64_nvf4<SELECTED / 4, SELECTED % 4>(c, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, a[4], b[2]);
    else if constexpr (SELECTED < 7)
      run<SELECTED + 1>(c, a, b, selected);
  }
};

template <class Instruction>
__global__ void mma_probe(const uint32_t* a, const uint32_t* b, typename Instruction::Sum* c, int start) {
  if constexpr (TARGET >= Instruction::LEAST) {
    uint32_t ra[Instruction::NA], rb[Instruction::NB];
    typename Instruction::Sum rc[Instruction::NC];
    load_registers(ra, a), load_registers(rb, b), load_registers(rc, c);
    Instruction::run(rc, ra, rb, start);
    store_registers(c, rc);
  }
}

// ---- ldmatrix, cp.async ---------------------------------------------------------------------------------------------
// 32 rows of 16 bytes through shared memory; then x4, x4 transposed, x2, x2 transposed, x1, x1 transposed.
static __global__ void ldmatrix_probe(const uint4* in, uint32_t* x4, uint32_t* x2, uint32_t* x1) {
  SHARED_DYNAMIC(shared);
  const int lane = threadIdx.x;
  unsigned char* const row = shared + lane * 16;
  sts(row, ldg<uint4>(in + lane));
  __syncwarp();
  uint32_t d4[4], d2[2], d1[1];
  ldmatrix_x4(d4, row), store_registers(x4, d4);
  ldmatrix_x4<true>(d4, row), store_registers(x4 + 128, d4);
  ldmatrix_x2(d2, row), store_registers(x2, d2);
  ldmatrix_x2<true>(d2, row), store_registers(x2 + 64, d2);
  ldmatrix_x1(d1, row), store_registers(x1, d1);
  ldmatrix_x1<true>(d1, row), store_registers(x1 + 32, d1);
}

// Each thread copies counts[i] of its 16, 8 and 4 bytes, in a group each, and reads them back as soon as they are
// there.
static __global__ void copy_probe(const uint4* in, const int* counts, uint4* out16, uint2* out8, uint32_t* out4) {
  SHARED_DYNAMIC(shared);
  const int i = threadIdx.x, count = ldg<int>(counts + i);
  unsigned char *const to16 = shared + i * 32, *const to8 = to16 + 16, *const to4 = to16 + 24;
  cp_async16(to16, in + i, count);
  cp_async_commit();
  cp_async8(to8, in + i, count < 8 ? count : 8);
  cp_async_commit();
  cp_async4(to4, in + i, count < 4 ? count : 4);
  cp_async_commit();
  cp_async_wait<2>();
  stg(out16 + i, lds<uint4>(to16));
  cp_async_wait<1>();
  stg(out8 + i, lds<uint2>(to8));
  cp_async_wait<0>();
  stg(out4 + i, lds<uint32_t>(to4));
}

// ---- conversions, shuffles, approximate functions -------------------------------------------------------------------
// Each of v, -v: packed, and one by one.
static __global__ void narrow_probe(const float* in, uint32_t* bf16s, uint32_t* f16s, uint32_t* singles, uint32_t* e2m1,
                                    uint32_t* e4m3s, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = ldg<float>(in + i);
  stg(bf16s + i, cvt_16bitx2<bf16>(v, -v));
  stg(f16s + i, cvt_16bitx2<f16>(v, -v));
  stg(singles + i, uint32_t(cvt_16bit<bf16>(v)) | uint32_t(cvt_16bit<f16>(v)) << 16);
  stg(e2m1 + i, cvt_e2m1x2(v, -v));
  stg(e4m3s + i, uint32_t(cvt_e4m3(v)) | uint32_t(cvt_e4m3(-v)) << 8);
}

// Of every pair of 16-bit numbers: as bf16, as f16; and the register as an integer.
static __global__ void widen_probe(const uint32_t* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t pair = ldg<uint32_t>(in + i);
  float bf[2], f[2];
  cvt_f32x2<bf16>(bf, pair), cvt_f32x2<f16>(f, pair);
  out += i * 7;
  for (int j = 0; j < 2; ++j) stg(out + j, bf[j]), stg(out + 2 + j, f[j]);
  stg(out + 4, cvt_f32(bf16(uint16_t(pair)))), stg(out + 5, cvt_f32(f16(uint16_t(pair))));
  stg(out + 6, cvt_f32(int(pair)));
}

// xor, down, idx of all lanes, then of segments of eight; `by` is what each lane asks for.
template <class T>
__global__ void shuffle_probe(const T* in, const int* by, T* out) {
  const T v = ldg<T>(in + threadIdx.x);
  const int b = ldg<int>(by + threadIdx.x);
  const T got[6] = {shfl_xor(v, b),
                    shfl_down(v, b),
                    shfl(v, b),
                    __shfl_xor_sync(~0u, v, b, 8),
                    __shfl_down_sync(~0u, v, b, 8),
                    __shfl_sync(~0u, v, b, 8)};
  store_registers(out, got);
}

static __global__ void approx_probe(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = ldg<float>(in + i);
  stg(out + i * 4, ex2_approx(v)), stg(out + i * 4 + 1, tanh_approx(v));
  stg(out + i * 4 + 2, rcp_approx(v)), stg(out + i * 4 + 3, rsqrtf(fabsf(v)));
}

}  // namespace nunchaku_py::cuda
