// mbarriers: a phase is complete when as many arrivals as the barrier counts have come, and all bytes that were to be
// expected. The first phase has parity 0, then they alternate. A waiter says which phase it waits for, so it must not
// be two phases late; of a barrier that was never used, the phase of parity 1 counts as complete.
//
// What a thread did in shared memory before it arrives is done for those who have waited, in its own block and in
// others of the cluster. Not so what it wrote to global memory, for another block: arrivals and waits are of the scope
// of a block, because a release of cluster scope becomes a MEMBAR.ALL.GPU before each arrival, and an acquire of
// cluster scope a CCTL.IVALL after each wait, which empties L1. cluster_sync has both.
#pragma once
#include "cuda/common/memory.cuh"

namespace nunchaku_py::cuda {

struct alignas(8) Barrier {  // in shared memory
  uint64_t state;
};

template <int SM = TARGET>
DEVICE void mbarrier_init(Barrier* barrier, int arrivals) {
  static_assert(SM >= 90, "mbarrier_init needs sm_90");
#ifndef __CUDACC__
  simt::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// After the last mbarrier_init, by the thread that did it; the other threads, and TMA, need a barrier after that.
template <int SM = TARGET>
DEVICE void mbarrier_init_done() {
  static_assert(SM >= 90, "mbarrier_init_done needs sm_90");
#ifndef __CUDACC__
  simt::mbarrier_init_done();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival, and so many bytes to come: before the copies are asked for, or after.
template <int SM = TARGET>
DEVICE void mbarrier_expect(Barrier* barrier, int bytes) {
  static_assert(SM >= 90, "mbarrier_expect needs sm_90");
#ifndef __CUDACC__
  simt::mbarrier_expect(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

template <int SM = TARGET>
DEVICE void mbarrier_arrive(Barrier* barrier) {
  static_assert(SM >= 90, "mbarrier_arrive needs sm_90");
#ifndef __CUDACC__
  simt::mbarrier_arrive(barrier);
#else
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// At the barrier of the same place in block `rank` of the cluster.
template <int SM = TARGET>
DEVICE void mbarrier_arrive_at(Barrier* barrier, int rank) {
  static_assert(SM >= 90, "mbarrier_arrive_at needs sm_90");
#ifndef __CUDACC__
  simt::mbarrier_arrive_at(barrier, rank);
#else
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cta.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Returns when the phase of that parity is complete.
template <int SM = TARGET>
DEVICE void mbarrier_wait(Barrier* barrier, int parity) {
  static_assert(SM >= 90, "mbarrier_wait needs sm_90");
#ifndef __CUDACC__
  simt::mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{ .reg .pred done; "
      "again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1; "
      "@!done bra again; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// What this thread stored in shared memory, wgmma and TMA see from here on.
template <int SM = TARGET>
DEVICE void fence_async() {
  static_assert(SM >= 90, "fence_async needs sm_90");
#ifndef __CUDACC__
  simt::fence_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace nunchaku_py::cuda
