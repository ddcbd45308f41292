// Shapes of work on Hopper: what two blocks of a cluster, and each of their warpgroups, make of y at a time.
#pragma once

namespace nunchaku_py::cuda {

constexpr int SM90_MOST_SHARED = 227 << 10;  // bytes that a block may have

// A block takes 128 rows, 64 for each of its two warpgroups that multiply; BN channels are the same for both blocks of
// a cluster, which share what they read of the weight.
template <int BN_>
struct TileSm90 {
  static constexpr int BM = 128, BN = BN_, CLUSTER = 2;
  static constexpr int STAGES = BN_ > 128 ? 4 : 6;
  static constexpr int MULTIPLYING = 2, THREADS = 128 * (1 + MULTIPLYING);  // warpgroups; one more copies
  static constexpr int SUMS = BN / 2;                                       // of a thread
};

}  // namespace nunchaku_py::cuda
