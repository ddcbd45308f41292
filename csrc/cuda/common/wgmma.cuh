// wgmma: a warpgroup (four warps, the first a multiple of four) multiplies 64 rows of A with N columns of B, both from
// shared memory, or A from registers. Rows of A and columns of B are 32 consecutive bytes each. With warp and lane
// 4·g + t within the warpgroup, a thread has
//   D register r: row 16·warp + g + 8·(r / 2 % 2), column 8·(r / 4) + 2·t + r % 2
//   A register r: row 16·warp + g + 8·(r % 2), bytes 4·t + 16·(r / 2) and up
// It runs by itself: wgmma_fence before the first, and after every touch of D or A's registers by other instructions;
// then wgmma_commit, and until a wgmma_wait neither D may be touched nor what is read in shared memory be overwritten.
// Sums wrap around.
#pragma once
#include "cuda/common/memory.cuh"

namespace nunchaku_py::cuda {

// A tile of rows of 128 bytes with 128-byte swizzle (tma.cuh), at a multiple of 1024: eight rows every 1024 bytes. The
// next 32 bytes of each row are the descriptor plus 2.
template <bool HAS = HOPPER>
DEVICE uint64_t tile_descriptor(const void* shared) {
  static_assert(HAS, "tile_descriptor needs sm_90a");
  constexpr uint64_t ROWS_OF_128 = 1ull << 62, EIGHT_ROWS = 1024, UNUSED = 1;
#ifndef __CUDACC__
  const uint32_t address = simt::shared_address(shared);
#else
  const uint32_t address = shared_address(shared);
#endif
  return ROWS_OF_128 | EIGHT_ROWS >> 4 << 32 | UNUSED << 16 | (address & 0x3ffff) >> 4;
}

template <bool HAS = HOPPER>
DEVICE void wgmma_fence() {
  static_assert(HAS, "wgmma_fence needs sm_90a");
#ifndef __CUDACC__
  simt::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// What this warpgroup multiplied since its last commit is a group.
template <bool HAS = HOPPER>
DEVICE void wgmma_commit() {
  static_assert(HAS, "wgmma_commit needs sm_90a");
#ifndef __CUDACC__
  simt::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Returns when all groups are done but for the N committed last.
template <int N, bool HAS = HOPPER>
DEVICE void wgmma_wait() {
  static_assert(HAS, "wgmma_wait needs sm_90a");
#ifndef __CUDACC__
  simt::wgmma_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// … and ties D to the wait: the compiler may use a number in D before it otherwise, as nothing tells it not to.
template <int N, int REGISTERS, bool HAS = HOPPER>
DEVICE void wgmma_wait([[maybe_unused]] int (&d)[REGISTERS]) {
  wgmma_wait<N, HAS>();
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+r"(d[i])::"memory");
#endif
}

// Sixteen registers of D, as operands and in the text.
#ifdef __CUDACC__
#define WGMMA_4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define WGMMA_16(i) WGMMA_4(i), WGMMA_4(i + 4), WGMMA_4(i + 8), WGMMA_4(i + 12)
#define WGMMA_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_TEXT_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_TEXT_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_TEXT_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_TEXT_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_TEXT_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// N columns: X(N, text of D, operands of D, numbers of the operands after D's)
#define WGMMA_D_32 WGMMA_16(0), WGMMA_16(16)
#define WGMMA_D_64 WGMMA_D_32, WGMMA_16(32), WGMMA_16(48)
#define WGMMA_D_96 WGMMA_D_64, WGMMA_16(64), WGMMA_16(80)
#define WGMMA_TEXT_32 WGMMA_TEXT_0 ", " WGMMA_TEXT_1
#define WGMMA_TEXT_64 WGMMA_TEXT_32 ", " WGMMA_TEXT_2 ", " WGMMA_TEXT_3
#define WGMMA_TEXT_96 WGMMA_TEXT_64 ", " WGMMA_TEXT_4 ", " WGMMA_TEXT_5
#define WGMMA_LIST(...) __VA_ARGS__
#define WGMMA_FOR_EACH(X)                                                                                            \
  X(64, WGMMA_TEXT_32, WGMMA_LIST(WGMMA_D_32), "%32", "%33", "%34", "%35", "%36", "%37")                             \
  X(96, WGMMA_TEXT_32 ", " WGMMA_TEXT_2, WGMMA_LIST(WGMMA_D_32, WGMMA_16(32)), "%48", "%49", "%50", "%51", "%52",    \
    "%53")                                                                                                           \
  X(128, WGMMA_TEXT_64, WGMMA_LIST(WGMMA_D_64), "%64", "%65", "%66", "%67", "%68", "%69")                            \
  X(160, WGMMA_TEXT_64 ", " WGMMA_TEXT_4, WGMMA_LIST(WGMMA_D_64, WGMMA_16(64)), "%80", "%81", "%82", "%83", "%84",   \
    "%85")                                                                                                           \
  X(192, WGMMA_TEXT_96, WGMMA_LIST(WGMMA_D_96), "%96", "%97", "%98", "%99", "%100", "%101")                          \
  X(224, WGMMA_TEXT_96 ", " WGMMA_TEXT_6, WGMMA_LIST(WGMMA_D_96, WGMMA_16(96)), "%112", "%113", "%114", "%115",      \
    "%116", "%117")                                                                                                  \
  X(256, WGMMA_TEXT_96 ", " WGMMA_TEXT_6 ", " WGMMA_TEXT_7, WGMMA_LIST(WGMMA_D_96, WGMMA_16(96), WGMMA_16(112)),     \
    "%128", "%129", "%130", "%131", "%132", "%133")

#define WGMMA_BEGIN(n, p) \
  "{ .reg .pred add; setp.ne.b32 add, " p ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {"
#define WGMMA_SHARED(n, text, operands, a, b, p, ...)                                               \
  if constexpr (N == n)                                                                             \
    asm volatile(WGMMA_BEGIN(n, p) text "}, " a ", " b ", add; }" : operands : "l"(a_tile), "l"(b_tile), "r"(int(add)));
#define WGMMA_REGISTERS(n, text, operands, a0, a1, a2, a3, b, p)                                               \
  if constexpr (N == n)                                                                                        \
    asm volatile(WGMMA_BEGIN(n, p) text "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", add; }"                   \
                 : operands                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(int(add)));
#endif

template <int N>
constexpr bool WGMMA_COLUMNS = N % 32 == 0 && N >= 64 && N <= 256;

// D = A·B, or D += A·B.
template <int N, bool HAS = HOPPER>
DEVICE void wgmma_m64k32_s8(int (&d)[N / 2], uint64_t a_tile, uint64_t b_tile, bool add) {
  static_assert(HAS, "wgmma_m64k32_s8 needs sm_90a");
  static_assert(WGMMA_COLUMNS<N>, "wgmma_m64k32_s8 has 64 to 256 columns, in steps of 32");
#ifndef __CUDACC__
  simt::wgmma(d, a_tile, b_tile, add);
#else
  WGMMA_FOR_EACH(WGMMA_SHARED)
#endif
}

template <int N, bool HAS = HOPPER>
DEVICE void wgmma_m64k32_s8(int (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_tile, bool add) {
  static_assert(HAS, "wgmma_m64k32_s8 needs sm_90a");
  static_assert(WGMMA_COLUMNS<N>, "wgmma_m64k32_s8 has 64 to 256 columns, in steps of 32");
#ifndef __CUDACC__
  simt::wgmma(d, a, b_tile, add);
#else
  WGMMA_FOR_EACH(WGMMA_REGISTERS)
#endif
}

#ifdef __CUDACC__
#undef WGMMA_4
#undef WGMMA_16
#undef WGMMA_TEXT_0
#undef WGMMA_TEXT_1
#undef WGMMA_TEXT_2
#undef WGMMA_TEXT_3
#undef WGMMA_TEXT_4
#undef WGMMA_TEXT_5
#undef WGMMA_TEXT_6
#undef WGMMA_TEXT_7
#undef WGMMA_D_32
#undef WGMMA_D_64
#undef WGMMA_D_96
#undef WGMMA_TEXT_32
#undef WGMMA_TEXT_64
#undef WGMMA_TEXT_96
#undef WGMMA_LIST
#undef WGMMA_FOR_EACH
#undef WGMMA_BEGIN
#undef WGMMA_SHARED
#undef WGMMA_REGISTERS
#endif

}  // namespace nunchaku_py::cuda
