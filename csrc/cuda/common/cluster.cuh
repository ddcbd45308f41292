// Blocks of a cluster, barriers of some of a block's warps, and how a block shares its registers out among warpgroups.
#pragma once
#include "cuda/common/platform.cuh"

namespace nunchaku_py::cuda {

template <int SM = TARGET>
DEVICE int cluster_rank() {
  static_assert(SM >= 90, "cluster_rank needs sm_90");
#ifndef __CUDACC__
  return simt::cluster_rank();
#else
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

template <int SM = TARGET>
DEVICE int cluster_size() {
  static_assert(SM >= 90, "cluster_size needs sm_90");
#ifndef __CUDACC__
  return simt::cluster_size();
#else
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// All threads of all blocks of the cluster. A block that others still write to, or arrive at, must not end before.
template <int SM = TARGET>
DEVICE void cluster_sync() {
  static_assert(SM >= 90, "cluster_sync needs sm_90");
#ifndef __CUDACC__
  simt::cluster_sync();
#else
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The barrier `id` of the block's sixteen, for THREADS threads in whole warps; __syncthreads is number 0.
template <int THREADS>
DEVICE void named_barrier(int id) {
  static_assert(THREADS % 32 == 0, "a named barrier is for whole warps");
#ifndef __CUDACC__
  simt::named_barrier(id, THREADS);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
#endif
}

// All warps of a warpgroup say how many registers each thread has from here on: first those that give some back, while
// those that want more wait. The kernel needs __launch_bounds__(threads, 1): without the 1 the assembler may ignore it,
// with an info that it cannot determine the register count.
template <int N, bool HAS = HOPPER>
DEVICE void more_registers() {
  static_assert(HAS, "more_registers needs sm_90a");
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a thread has 24 to 256 registers, in eights");
#ifndef __CUDACC__
  simt::set_registers(N, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N, bool HAS = HOPPER>
DEVICE void fewer_registers() {
  static_assert(HAS, "fewer_registers needs sm_90a");
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a thread has 24 to 256 registers, in eights");
#ifndef __CUDACC__
  simt::set_registers(N, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

}  // namespace nunchaku_py::cuda
