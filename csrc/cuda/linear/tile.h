// Shapes of work: what a block of threads and each of its warps make of y at a time.
#pragma once
#include "cuda/common/scales.h"

namespace nunchaku_py::cuda {

constexpr int STEP_BYTES = 32;  // of a row's codes, which an instruction multiplies

template <int BM_, int BN_, int WM_, int WN_, int STAGES_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_;
  static constexpr int SCALED_ROWS = BM < SCALE_BLOCK ? SCALE_BLOCK : BM;  // whole blocks of scales are copied
  static constexpr int MT = WM / 16, NT = WN / 8;                          // fragments of a warp
  static constexpr int WARPS_N = BN / WN, WARPS = BM / WM * WARPS_N, THREADS = 32 * WARPS;
  static constexpr bool LARGE = MT * NT >= 32;  // sums take half of the registers
  static_assert(BM % WM == 0 && BN % WN == 0, "a block is whole warps");
  static_assert(WM % 16 == 0 && WM <= SCALE_BLOCK && SCALE_BLOCK % WM == 0, "a warp's rows lie in one block of scales");
  static_assert(WN % 16 == 0 && WN <= SCALE_BLOCK && SCALE_BLOCK % WN == 0,
                "a warp's columns lie in one block of scales");
  static_assert(SCALE_BLOCK % BM == 0 || BM % SCALE_BLOCK == 0, "scales are copied in whole blocks");
  static_assert(BN % SCALE_BLOCK == 0, "scales are copied in whole blocks");
  static_assert(STAGES >= 2, "one stage is computed while the next is copied");
};

// A thread's part of a warp's fragments of y.
template <class Tile, class Sum = float>
using Sums = Sum[Tile::MT][Tile::NT][4];

}  // namespace nunchaku_py::cuda
