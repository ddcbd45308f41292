// Hopper's instructions in kernels: the host runs them (hopper.cpp), nvcc compiles them (hopper.cu). A kernel is empty
// for targets that lack the instructions: it is a template so that those do not compile it, and of something that does
// not depend on the target, by CUDA's rules.
#pragma once
#include "cuda/common/cluster.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/common/wgmma.cuh"

namespace nunchaku_py::cuda {

constexpr int WARPGROUP = 128;

// ---- TMA ------------------------------------------------------------------------------------------------------------
struct BoxParams {
  TensorMap map;
  uint4* out;  // of each block the box, as it lies in shared memory
  int byte, row, rows;
};

// Every block of the cluster loads its part of the box and sends it to all of them. 128 threads.
template <class Params>
__global__ void __launch_bounds__(WARPGROUP, 1) box_probe(const __grid_constant__ Params p) {
  if constexpr (HOPPER) {
    SHARED_DYNAMIC(shared);
    auto* const full = reinterpret_cast<Barrier*>(shared + p.rows * BOX_BYTES);
    const int thread = this_thread(), size = cluster_size(), rank = cluster_rank(), part = p.rows / size;
    if (thread == 0) {
      tma_prefetch(&p.map);
      mbarrier_init(full, 1);
      mbarrier_init_done();
    }
    cluster_sync();
    if (thread == 0) {
      mbarrier_expect(full, p.rows * BOX_BYTES);
      unsigned char* const to = shared + rank * part * BOX_BYTES;
      if (size == 1)
        tma_load(to, &p.map, p.byte, p.row, full);
      else
        tma_load_multicast(to, &p.map, p.byte, p.row + rank * part, full, uint16_t((1 << size) - 1));
    }
    mbarrier_wait(full, 0);
    for (int i = thread; i < p.rows * BOX_BYTES / 16; i += WARPGROUP)
      stg(p.out + this_block() * p.rows * BOX_BYTES / 16 + i, lds<uint4>(shared + i * 16));
    cluster_sync();
  }
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
struct WgmmaParams {
  TensorMap a, b;           // boxes of 64 rows, of N rows
  const uint32_t* a_codes;  // or A as fragments: for every 32 bytes of K, four registers of each thread
  int* d;                   // sums to begin with and to end with, N/2 of each thread
  int k;
  bool add;
};

// D = A·Bᵀ of one tile, K in blocks of 128 bytes through a single stage.
template <int N, bool REGISTERS>
__global__ void __launch_bounds__(WARPGROUP, 1) wgmma_probe(const __grid_constant__ WgmmaParams p) {
  if constexpr (HOPPER) {
    constexpr int A_BYTES = 64 * BOX_BYTES, B_BYTES = N * BOX_BYTES;
    SHARED_DYNAMIC(shared);
    auto* const full = reinterpret_cast<Barrier*>(shared + A_BYTES + B_BYTES);
    const int thread = this_thread();
    if (thread == 0) {
      mbarrier_init(full, 1);
      mbarrier_init_done();
    }
    __syncthreads();
    int d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = ldg<int>(p.d + thread * (N / 2) + i);
    for (int block = 0; block < (p.k + BOX_BYTES - 1) / BOX_BYTES; ++block) {
      if (thread == 0) {
        mbarrier_expect(full, A_BYTES + B_BYTES);
        tma_load(shared, &p.a, block * BOX_BYTES, 0, full);
        tma_load(shared + A_BYTES, &p.b, block * BOX_BYTES, 0, full);
      }
      mbarrier_wait(full, block % 2);
      uint32_t a[4][4];
#pragma unroll
      for (int i = 0; REGISTERS && i < 16; ++i)
        a[i / 4][i % 4] = ldg<uint32_t>(p.a_codes + ((block * 4 + i / 4) * WARPGROUP + thread) * 4 + i % 4);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t b = tile_descriptor(shared + A_BYTES) + i * 2;
        const bool add = p.add || block || i;
        if constexpr (REGISTERS)
          wgmma_m64k32_s8<N>(d, a[i], b, add);
        else
          wgmma_m64k32_s8<N>(d, tile_descriptor(shared) + i * 2, b, add);
      }
      wgmma_commit();
      wgmma_wait<0>(d);
      __syncthreads();  // before the stage is filled again
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) stg(p.d + thread * (N / 2) + i, d[i]);
  }
}

}  // namespace nunchaku_py::cuda
