// mma.sync, C += A·B: a warp multiplies 16 (or 8) rows of A with 8 columns of B. With lane = 4·g + t and E elements in
// a register, the fragments of one lane are
//   A register r: row g + 8·(r % 2), columns E·t + 4·E·(r / 2) and up     (with 8 rows, A is one register)
//   B register r: column g, rows E·t + 4·E·r and up
//   C register r: row g + 8·(r / 2), column 2·t + r % 2
// Integer sums wrap around; how float sums round inside PTX leaves open. The `_from` forms start from one number
// instead of C: what would cost a move per register costs nothing.
#pragma once
#include <type_traits>

#include "cuda/common/platform.cuh"
#include "cuda/common/types.cuh"

namespace nunchaku_py::cuda {

// The operands of an instruction, named by how many registers A, B and C have.
#ifdef __CUDACC__
#define MMA_112(kind)                                                      \
  asm volatile("mma.sync.aligned." kind " {%0, %1}, {%2}, {%3}, {%0, %1};" \
               : "+r"(c[0]), "+r"(c[1])                                    \
               : "r"(a[0]), "r"(b[0]))
#define MMA_112_FROM(kind)                                                 \
  asm volatile("mma.sync.aligned." kind " {%0, %1}, {%2}, {%3}, {%4, %4};" \
               : "=r"(d[0]), "=r"(d[1])                                    \
               : "r"(a[0]), "r"(b[0]), "r"(start))
#define MMA_214(kind)                                                                          \
  asm volatile("mma.sync.aligned." kind " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
               : "r"(a[0]), "r"(a[1]), "r"(b[0]))
#define MMA_424(kind, type)                                                                                \
  asm volatile("mma.sync.aligned." kind " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+" type(c[0]), "+" type(c[1]), "+" type(c[2]), "+" type(c[3])                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define MMA_424_FROM(kind)                                                                                     \
  asm volatile("mma.sync.aligned." kind " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};" \
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start))
#endif

// ---- 4-bit integers, s32 sums: native on sm_80, 86 and 89 (m8n8k32 also on sm_75), elsewhere many instructions -----
DEVICE void mma_m8n8k32_s4(int (&c)[2], const uint32_t (&a)[1], const uint32_t (&b)[1]) {
#ifndef __CUDACC__
  simt::mma<8, 32, 4>("mma_m8n8k32_s4", c, a, b, simt::s4, simt::s4);
#else
  MMA_112("m8n8k32.row.col.s32.s4.s4.s32");
#endif
}

DEVICE void mma_m8n8k32_s4_from(int (&d)[2], const uint32_t (&a)[1], const uint32_t (&b)[1], int start) {
#ifndef __CUDACC__
  simt::mma_from<8, 32, 4>("mma_m8n8k32_s4_from", d, a, b, simt::s4, simt::s4, start);
#else
  MMA_112_FROM("m8n8k32.row.col.s32.s4.s4.s32");
#endif
}

DEVICE void mma_m8n8k32_u4s4(int (&c)[2], const uint32_t (&a)[1], const uint32_t (&b)[1]) {
#ifndef __CUDACC__
  simt::mma<8, 32, 4>("mma_m8n8k32_u4s4", c, a, b, simt::u4, simt::s4);
#else
  MMA_112("m8n8k32.row.col.s32.u4.s4.s32");
#endif
}

DEVICE void mma_m8n8k32_u4s4_from(int (&d)[2], const uint32_t (&a)[1], const uint32_t (&b)[1], int start) {
#ifndef __CUDACC__
  simt::mma_from<8, 32, 4>("mma_m8n8k32_u4s4_from", d, a, b, simt::u4, simt::s4, start);
#else
  MMA_112_FROM("m8n8k32.row.col.s32.u4.s4.s32");
#endif
}

template <int SM = TARGET>
DEVICE void mma_m16n8k64_s4(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(SM >= 80, "mma_m16n8k64_s4 needs sm_80");
#ifndef __CUDACC__
  simt::mma<16, 64, 4>("mma_m16n8k64_s4", c, a, b, simt::s4, simt::s4);
#else
  MMA_424("m16n8k64.row.col.s32.s4.s4.s32", "r");
#endif
}

template <int SM = TARGET>
DEVICE void mma_m16n8k64_s4_from(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int start) {
  static_assert(SM >= 80, "mma_m16n8k64_s4_from needs sm_80");
#ifndef __CUDACC__
  simt::mma_from<16, 64, 4>("mma_m16n8k64_s4_from", d, a, b, simt::s4, simt::s4, start);
#else
  MMA_424_FROM("m16n8k64.row.col.s32.s4.s4.s32");
#endif
}

template <int SM = TARGET>
DEVICE void mma_m16n8k64_u4s4(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(SM >= 80, "mma_m16n8k64_u4s4 needs sm_80");
#ifndef __CUDACC__
  simt::mma<16, 64, 4>("mma_m16n8k64_u4s4", c, a, b, simt::u4, simt::s4);
#else
  MMA_424("m16n8k64.row.col.s32.u4.s4.s32", "r");
#endif
}

template <int SM = TARGET>
DEVICE void mma_m16n8k64_u4s4_from(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int start) {
  static_assert(SM >= 80, "mma_m16n8k64_u4s4_from needs sm_80");
#ifndef __CUDACC__
  simt::mma_from<16, 64, 4>("mma_m16n8k64_u4s4_from", d, a, b, simt::u4, simt::s4, start);
#else
  MMA_424_FROM("m16n8k64.row.col.s32.u4.s4.s32");
#endif
}

// m16n8k64 from a start: one instruction, on sm_75 four of m8n8k32.
template <bool UNSIGNED, int SM = TARGET>
DEVICE void mma_m16n8k64_from(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int start) {
  if constexpr (SM >= 80 && UNSIGNED) {
    mma_m16n8k64_u4s4_from<SM>(d, a, b, start);
  } else if constexpr (SM >= 80) {
    mma_m16n8k64_s4_from<SM>(d, a, b, start);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int half[2];
      if constexpr (UNSIGNED) {
        mma_m8n8k32_u4s4_from(half, {a[i]}, {b[0]}, start);
        mma_m8n8k32_u4s4(half, {a[i + 2]}, {b[1]});
      } else {
        mma_m8n8k32_s4_from(half, {a[i]}, {b[0]}, start);
        mma_m8n8k32_s4(half, {a[i + 2]}, {b[1]});
      }
      d[i * 2] = half[0], d[i * 2 + 1] = half[1];
    }
  }
}

// ---- 8-bit integers, s32 sums ---------------------------------------------------------------------------------------
DEVICE void mma_m8n8k16_s8(int (&c)[2], const uint32_t (&a)[1], const uint32_t (&b)[1]) {
#ifndef __CUDACC__
  simt::mma<8, 16, 8>("mma_m8n8k16_s8", c, a, b, simt::s8, simt::s8);
#else
  MMA_112("m8n8k16.row.col.s32.s8.s8.s32");
#endif
}

// One instruction, on sm_75 four of m8n8k16.
template <int SM = TARGET>
DEVICE void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (SM >= 80) {
#ifndef __CUDACC__
    simt::mma<16, 32, 8>("mma_m16n8k32_s8", c, a, b, simt::s8, simt::s8);
#else
    MMA_424("m16n8k32.row.col.s32.s8.s8.s32", "r");
#endif
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int half[2] = {c[i * 2], c[i * 2 + 1]};
      mma_m8n8k16_s8(half, {a[i]}, {b[0]});
      mma_m8n8k16_s8(half, {a[i + 2]}, {b[1]});
      c[i * 2] = half[0], c[i * 2 + 1] = half[1];
    }
  }
}

// ---- 16-bit floats, float sums --------------------------------------------------------------------------------------
DEVICE void mma_m16n8k8_f16(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
#ifndef __CUDACC__
  simt::mma<16, 8, 16>("mma_m16n8k8_f16", c, a, b, simt::f16_value, simt::f16_value);
#else
  MMA_214("m16n8k8.row.col.f32.f16.f16.f32");
#endif
}

template <int SM = TARGET>
DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(SM >= 80, "mma_m16n8k16_f16 needs sm_80");
#ifndef __CUDACC__
  simt::mma<16, 16, 16>("mma_m16n8k16_f16", c, a, b, simt::f16_value, simt::f16_value);
#else
  MMA_424("m16n8k16.row.col.f32.f16.f16.f32", "f");
#endif
}

template <int SM = TARGET>
DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(SM >= 80, "mma_m16n8k16_bf16 needs sm_80");
#ifndef __CUDACC__
  simt::mma<16, 16, 16>("mma_m16n8k16_bf16", c, a, b, simt::bf16_value, simt::bf16_value);
#else
  MMA_424("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
#endif
}

template <class T, int SM = TARGET>
constexpr bool MULTIPLIES = SM >= 80 || std::is_same_v<T, f16>;  // sm_75 has no bf16 product

template <class T, int SM = TARGET>
DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    mma_m16n8k16_bf16<SM>(c, a, b);
  } else if constexpr (SM >= 80) {
    mma_m16n8k16_f16<SM>(c, a, b);
  } else {  // two instructions of sm_75
    mma_m16n8k8_f16(c, {a[0], a[1]}, {b[0]});
    mma_m16n8k8_f16(c, {a[2], a[3]}, {b[1]});
  }
}

// ---- NVFP4, float sums ----------------------------------------------------------------------------------------------
// An instruction of sm_120a, 120f and 121a, and of neither plain sm_120 nor sm_100a.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH_SPECIFIC__ / 100 == 12 || __CUDA_ARCH_FAMILY_SPECIFIC__ / 100 == 12
constexpr bool MULTIPLIES_NVFP4 = TARGET >= 120;
#else
constexpr bool MULTIPLIES_NVFP4 = false;
#endif

// e2m1, each 16 columns of A and rows of B times a ue4m3 scale, four scales to a register, the lowest byte for the
// first 16. Of the four lanes from 4·g on, lanes 2·PAIR and 2·PAIR + 1 have those of rows g and g + 8 of A, and LANE
// has those of column g of B; the other lanes' registers are not read. So one register of every lane serves two
// fragments of A, or four of B.
template <int PAIR, int LANE, int SM = TARGET>
DEVICE void mma_m16n8k64_nvf4(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                              uint32_t scale_b) {
  static_assert(SM >= 120, "mma_m16n8k64_nvf4 needs sm_120a");
  static_assert(0 <= PAIR && PAIR < 2 && 0 <= LANE && LANE < 4, "there are two pairs of lanes, and four lanes");
#ifndef __CUDACC__
  simt::mma_nvf4("mma_m16n8k64_nvf4", c, a, b, scale_a, scale_b, PAIR, LANE);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, %12}, {%11}, {0, %13};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b), "n"(PAIR),
        "n"(LANE));
#endif
}

#ifdef __CUDACC__
#undef MMA_112
#undef MMA_112_FROM
#undef MMA_214
#undef MMA_424
#undef MMA_424_FROM
#endif

}  // namespace nunchaku_py::cuda
