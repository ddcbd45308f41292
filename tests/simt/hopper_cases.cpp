// Small kernels that use Hopper's instructions wrongly in one place, and some that use them rightly, for
// test_hopper_cases.py.
#include "call.h"
#include "cuda/common/ldmatrix.cuh"
#include "hopper.cuh"

using namespace nunchaku_py::cuda;

namespace {

constexpr int ROWS = 64, TILE = ROWS * BOX_BYTES, BYTES = 3 * TILE;  // shared memory: two tiles, and barriers behind

struct Case {
  const char* name;
  int threads, cluster;
  void (*kernel)(TensorMap map, int* out);  // a matrix of 100 rows of 256 bytes in boxes of 64; 100 numbers
};

struct Places {
  unsigned char *tile, *other;
  Barrier *full, *empty;
};
Places places() {
  SHARED_DYNAMIC(shared);
  auto* const barriers = reinterpret_cast<Barrier*>(shared + 2 * TILE);
  return {shared, shared + TILE, barriers, barriers + 1};
}

// Barriers for so many arrivals each, ready for use by all blocks.
Places ready(int full = 1, int empty = 1) {
  const Places p = places();
  if (threadIdx.x == 0) {
    mbarrier_init(p.full, full), mbarrier_init(p.empty, empty);
    mbarrier_init_done();
  }
  cluster_sync();
  return p;
}

// By one thread.
void load(unsigned char* to, const TensorMap& map, Barrier* full, int bytes = TILE) {
  mbarrier_expect(full, bytes);
  tma_load(to, &map, 0, 0, full);
}

// A tile by ordinary stores, 64 bytes of each thread.
void store_tile(unsigned char* tile) {
  for (int i = 0; i < 4; ++i) sts(tile + (threadIdx.x * 4 + i) * 16, uint4{1, 2, 3, 4});
}

void multiply(int (&d)[32], const unsigned char* a, const unsigned char* b) {
  wgmma_fence();
  wgmma_m64k32_s8<64>(d, tile_descriptor(a), tile_descriptor(b), false);
  wgmma_commit();
}

const Case cases[] = {
    // ---- mbarriers
    {"mbarrier_without_init", 1, 1, [](TensorMap, int*) { mbarrier_arrive(places().full); }},
    {"mbarrier_written_over", 1, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       sts(p.full, uint2{7, 7});
       mbarrier_arrive(p.full);
     }},
    {"mbarrier_of_another_thread_without_a_barrier", 64, 1,
     [](TensorMap, int*) {
       const Places p = places();
       if (threadIdx.x == 0) mbarrier_init(p.full, 1), mbarrier_init_done();
       __syncwarp();
       if (threadIdx.x == 32) mbarrier_wait(p.full, 1);
       if (threadIdx.x == 33) mbarrier_arrive(p.full);
     }},
    {"mbarrier_of_another_block_without_cluster_sync", 32, 2,
     [](TensorMap, int*) {
       const Places p = places();
       if (threadIdx.x == 0) mbarrier_init(p.full, 1), mbarrier_init_done();
       __syncthreads();
       if (threadIdx.x == 0 && cluster_rank() == 1) mbarrier_arrive_at(p.full, 0);
       cluster_sync();
     }},
    {"mbarrier_misaligned", 1, 1,
     [](TensorMap, int*) { mbarrier_init(reinterpret_cast<Barrier*>(places().tile + 4), 1); }},
    {"mbarrier_for_nobody", 1, 1, [](TensorMap, int*) { mbarrier_init(places().full, 0); }},
    {"mbarrier_that_nobody_arrives_at", 32, 1,
     [](TensorMap, int*) {
       const Places p = ready(3);
       if (threadIdx.x == 0) mbarrier_expect(p.full, 40);
       if (threadIdx.x < 4) mbarrier_wait(p.full, 0);
     }},
    {"mbarrier_arrivals_beyond_its_count", 32, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       if (threadIdx.x < 2) mbarrier_expect(p.full, 16);
     }},
    {"mbarrier_waited_for_too_late", 32, 1,  // two phases later its parity is again that of a phase to come
     [](TensorMap, int*) {
       const Places p = ready();
       if (threadIdx.x == 0) mbarrier_arrive(p.full), mbarrier_arrive(p.full);
       __syncthreads();
       mbarrier_wait(p.full, 0);
     }},
    {"arrival_in_no_block_of_the_cluster", 1, 2,
     [](TensorMap, int*) {
       const Places p = ready();
       mbarrier_arrive_at(p.full, 2);
     }},
    {"arrival_in_a_block_that_may_have_ended", 32, 2,
     [](TensorMap, int*) {
       const Places p = ready();
       if (cluster_rank() == 0 && threadIdx.x == 0) mbarrier_arrive_at(p.full, 1);
     }},
    {"arrival_without_init_done", 1, 2,
     [](TensorMap, int*) {
       const Places p = places();
       mbarrier_init(p.full, 1);
       cluster_sync();
       mbarrier_arrive_at(p.full, 1 - cluster_rank());
       cluster_sync();
     }},
    // ---- named barriers, registers
    {"named_barrier_zero", 32, 1, [](TensorMap, int*) { named_barrier<32>(0); }},
    {"named_barrier_of_half_warps", 64, 1,
     [](TensorMap, int*) {
       if (threadIdx.x % 32 < 16) named_barrier<32>(1);
     }},
    {"named_barrier_of_two_sizes", 64, 1,
     [](TensorMap, int*) {
       if (threadIdx.x < 32)
         named_barrier<64>(1);
       else
         named_barrier<96>(1);
     }},
    {"named_barrier_of_others", 128, 1,
     [](TensorMap, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + threadIdx.x * 4, 1);
       named_barrier<64>(1 + threadIdx.x / 64);
       lds<int>(shared + (threadIdx.x ^ 64) * 4);
     }},
    {"ldmatrix_without_syncwarp_after_a_named_barrier", 32, 1,
     [](TensorMap, int*) {
       SHARED_DYNAMIC(shared);
       named_barrier<32>(1);
       uint32_t d[4];
       sts(shared + threadIdx.x * 16, uint4{});
       ldmatrix_x4(d, shared + threadIdx.x * 16);
     }},
    {"fewer_registers_than_fewer", 128, 1,
     [](TensorMap, int*) {
       fewer_registers<40>();
       fewer_registers<48>();
     }},
    // ---- TMA
    {"tma_read_before_its_wait", 32, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       if (threadIdx.x == 0) load(p.tile, map, p.full);
       lds<int>(p.tile);
     }},
    {"tma_read_by_one_who_has_not_waited", 64, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       if (threadIdx.x == 0) load(p.tile, map, p.full);
       if (threadIdx.x < 32) mbarrier_wait(p.full, 0);
       else mbarrier_wait(p.empty, 1);
       lds<int>(p.tile);
     }},
    {"tma_twice_to_one_place", 32, 1,
     [](TensorMap map, int*) {
       const Places p = ready(2);
       if (threadIdx.x == 0) load(p.tile, map, p.full), load(p.tile, map, p.full);
       mbarrier_wait(p.full, 0);
     }},
    {"tma_over_what_was_stored_without_fence_async", 128, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       store_tile(p.tile);
       __syncthreads();
       if (threadIdx.x == 0) load(p.tile, map, p.full);
       mbarrier_wait(p.full, 0);
     }},
    {"tma_over_what_lanes_read_without_syncwarp", 64, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       if (threadIdx.x == 0) load(p.tile, map, p.full);
       mbarrier_wait(p.full, 0);
       if (threadIdx.x >= 32) {
         lds<int>(p.tile + threadIdx.x * 4);
         if (threadIdx.x == 40) mbarrier_arrive(p.empty);
       } else if (threadIdx.x == 0) {
         mbarrier_wait(p.empty, 0);
         load(p.tile, map, p.full);
       }
       mbarrier_wait(p.full, 1);
     }},
    {"tma_misaligned", 1, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       load(p.tile + 64, map, p.full);
     }},
    {"tma_past_the_end_of_shared_memory", 1, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       load(p.other + TILE + 128, map, p.full);
     }},
    {"tma_of_a_matrix_larger_than_its_buffer", 1, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       map.rows = 101;
       mbarrier_expect(p.full, TILE);
       tma_load(p.tile, &map, 0, 40, p.full);
     }},
    {"tma_that_nobody_waits_for", 32, 1,
     [](TensorMap map, int*) {
       const Places p = ready();
       if (threadIdx.x == 0) load(p.tile, map, p.full);
     }},
    {"tma_to_a_block_that_does_not_wait", 32, 2,
     [](TensorMap map, int*) {
       const Places p = ready();
       if (threadIdx.x == 0) mbarrier_expect(p.full, TILE);
       if (threadIdx.x == 0 && cluster_rank() == 0) tma_load_multicast(p.tile, &map, 0, 0, p.full, 3);
       if (cluster_rank() == 0) mbarrier_wait(p.full, 0);
     }},
    // ---- wgmma
    {"wgmma_of_fewer_threads", 96, 1,
     [](TensorMap, int*) { wgmma_fence(); }},
    {"wgmma_and_wgmma_wait_meet", 128, 1,
     [](TensorMap, int*) {
       if (threadIdx.x < 64)
         wgmma_fence();
       else
         wgmma_wait<0>();
     }},
    {"wgmma_of_different_tiles", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       store_tile(p.tile), store_tile(p.other), fence_async();
       __syncthreads();
       multiply(d, p.tile, threadIdx.x < 32 ? p.tile : p.other);
     }},
    {"wgmma_of_what_was_stored_without_fence_async", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       store_tile(p.tile);
       __syncthreads();
       multiply(d, p.tile, p.tile);
       wgmma_wait<0>(d);
     }},
    {"wgmma_of_what_was_stored_after_fence_async", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       fence_async();
       store_tile(p.tile);
       __syncthreads();
       multiply(d, p.tile, p.tile);
       wgmma_wait<0>(d);
     }},
    {"wgmma_of_what_was_stored_without_a_barrier", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       store_tile(p.tile), fence_async();
       multiply(d, p.tile, p.tile);
       wgmma_wait<0>(d);
     }},
    {"wgmma_of_what_nobody_wrote", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       multiply(d, p.tile, p.tile);
       wgmma_wait<0>(d);
     }},
    {"store_over_what_wgmma_reads", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       store_tile(p.tile), fence_async();
       __syncthreads();
       multiply(d, p.tile, p.tile);
       __syncthreads();
       store_tile(p.tile);
       wgmma_wait<0>(d);
     }},
    {"wgmma_without_another_fence", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       store_tile(p.tile), fence_async();
       __syncthreads();
       multiply(d, p.tile, p.tile);
       wgmma_wait<0>(d);
       d[3] += 1;
       wgmma_m64k32_s8<64>(d, tile_descriptor(p.tile), tile_descriptor(p.tile), true);
       wgmma_commit(), wgmma_wait<0>(d);
     }},
    {"wgmma_of_a_tile_between_two", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       multiply(d, p.tile + 512, p.tile);
     }},
    {"wgmma_never_waited_for", 128, 1,
     [](TensorMap, int*) {
       const Places p = ready();
       int d[32] = {};
       store_tile(p.tile), fence_async();
       __syncthreads();
       multiply(d, p.tile, p.tile);
     }},
    // ---- all is well
    {"right_named_barriers", 128, 1,
     [](TensorMap, int* out) {
       SHARED_DYNAMIC(shared);
       const int t = threadIdx.x;
       sts(shared + t * 4, t);
       named_barrier<64>(1 + t / 64);
       const int got = lds<int>(shared + (t ^ 32) * 4);
       named_barrier<128>(3);
       sts(shared + (t ^ 64) * 4, got);
       __syncwarp();
       uint32_t row[1];
       ldmatrix_x1(row, shared + (t ^ 64) / 32 * 128 + t % 8 * 16);  // what the warp has just stored
       __syncthreads();
       if (t < 100) stg(out + t, lds<int>(shared + t * 4));  // t ^ 96
     }},
    {"right_reads_of_stages", 96, 1,  // by lanes that each arrive, and by a warp for which one lane arrives
     [](TensorMap map, int* out) {
       const Places p = ready(1, 33);
       const int t = threadIdx.x;
       int sum = 0;
       for (int i = 0; i < 5; ++i) {
         if (t < 32) {
           if (t == 0) {
             mbarrier_wait(p.empty, i % 2 ^ 1);
             mbarrier_expect(p.full, TILE);
             tma_load(p.tile, &map, 0, i, p.full);
           }
           continue;
         }
         mbarrier_wait(p.full, i % 2);
         for (int j = 0; j < 8; ++j) sum += lds<int>(p.tile + j * 4 + 4 * (t / 64));
         if (t < 64) __syncwarp();
         if (t == 32 || t >= 64) mbarrier_arrive(p.empty);
       }
       if (t == 0) mbarrier_wait(p.empty, 0);
       if (t < 100) stg(out + t, sum);
     }},
    {"right_order_of_stores_tma_and_wgmma", 128, 1,
     [](TensorMap map, int* out) {
       const Places p = ready();
       int d[32], e[32];
       for (int i = 0; i < 3; ++i) {
         store_tile(p.tile), fence_async();
         __syncthreads();
         multiply(d, p.tile, p.tile);
         wgmma_m64k32_s8<64>(e, tile_descriptor(p.tile), tile_descriptor(p.tile) + 2, false);
         wgmma_commit();
         wgmma_wait<1>(d);  // of two groups with sums of their own
         const int first = d[0];
         wgmma_wait<0>(e);
         __syncthreads();
         if (threadIdx.x == 0) load(p.tile, map, p.full);
         mbarrier_wait(p.full, i % 2);
         if (threadIdx.x < 100) stg(out + threadIdx.x, first * 1000 + e[0] + (lds<int>(p.tile) - lds<int>(p.tile)));
         __syncthreads();
       }
     }},
    {"right_ends_of_threads", 64, 2,  // cluster_sync does not wait for those who have ended
     [](TensorMap, int* out) {
       if (threadIdx.x >= 40) return;
       cluster_sync();
       if (threadIdx.x == 0) stg(out + cluster_rank(), cluster_size());
     }},
};

}  // namespace

SIMT_EXPORT const char* run_case(simt::Call& call, const char* name, simt::Array matrix, simt::Array out) {
  return simt::run(call, [&] {
    const simt::Input<uint8_t> from("matrix", matrix);
    const simt::Output<int> to("out", out);
    const TensorMap map = tensor_map(from.data(), 100, 256, ROWS, BOX_BYTES);
    for (const Case& c : cases)
      if (!std::strcmp(c.name, name))
        return launch_cluster(c.cluster, c.kernel, c.cluster, c.threads, BYTES, nullptr, map, to.data());
    throw simt::Error(std::string("no case is called ") + name);
  });
}
