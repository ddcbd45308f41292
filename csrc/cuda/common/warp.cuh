// Numbers of thread and block, and values from other lanes, all 32 lanes taking part. __syncwarp, and shuffles of fewer
// lanes or within segments (__shfl_xor_sync …), are CUDA's own; tests/simt has them by the same names.
#pragma once
#include "cuda/common/platform.cuh"

namespace nunchaku_py::cuda {

// threadIdx.x and blockIdx.x, asked of the hardware each time: what is worked out from them is worked out where it is
// wanted, and occupies no register over a loop.
DEVICE int this_thread() {
#ifndef __CUDACC__
  return threadIdx.x;
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

DEVICE int this_block() {
#ifndef __CUDACC__
  return blockIdx.x;
#else
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
#endif
}

template <class T>
DEVICE T shfl_xor(T value, int lane_mask) {  // of lane own ^ lane_mask
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return __shfl_xor_sync(~0u, value, lane_mask);
}

template <class T>
DEVICE T shfl_down(T value, unsigned delta) {  // of lane own + delta; beyond the last, one's own
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return __shfl_down_sync(~0u, value, delta);
}

template <class T>
DEVICE T shfl(T value, int lane) {
  static_assert(sizeof(T) == 4, "a shuffle moves one register");
  return __shfl_sync(~0u, value, lane);
}

}  // namespace nunchaku_py::cuda
