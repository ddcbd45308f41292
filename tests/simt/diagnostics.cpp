// Kernels that do one thing wrong, and some that do it right, for test_diagnostics.py.
#include "call.h"
#include "cuda/common/cp_async.cuh"
#include "cuda/common/ldmatrix.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/warp.cuh"

using namespace nunchaku_py::cuda;

namespace {

struct Case {
  const char* name;
  unsigned threads;
  void (*kernel)(const int* in, int* out);  // 100 of each; 1024 bytes of shared memory
};

const Case cases[] = {
    // ---- where there is nothing
    {"global_read_past_the_end", 128, [](const int* in, int*) { ldg<int>(in + threadIdx.x); }},
    {"global_read_before_the_beginning", 1, [](const int* in, int*) { ldg<int>(in - 1); }},
    {"global_write_past_the_end", 128, [](const int*, int* out) { stg(out + threadIdx.x, 1); }},
    {"global_read_of_no_buffer", 1, [](const int*, int*) { ldg<int>(nullptr); }},
    {"shared_write_past_the_end", 288,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + threadIdx.x * 4, 1);
     }},
    {"shared_read_before_the_beginning", 1,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       lds<int>(shared - 4);
     }},
    {"cp_async_past_the_end", 32,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       cp_async16(shared + threadIdx.x * 16, in + threadIdx.x * 4);
     }},
    {"cp_async_of_too_many_bytes", 1,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       cp_async4(shared, in, 5);
     }},
    // ---- alignment, read-only memory
    {"global_misaligned", 1, [](const int* in, int*) { ldg<uint4>(in + 1); }},
    {"shared_misaligned", 1,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + 4, uint2{});
     }},
    {"cp_async_misaligned", 1,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       cp_async8(shared, in + 1);
     }},
    {"store_to_an_input", 1, [](const int* in, int*) { stg(const_cast<int*>(in), 1); }},
    // ---- poison
    {"read_of_what_nobody_wrote", 1,
     [](const int*, int* out) {
       SHARED_DYNAMIC(shared);
       stg(out, lds<int>(shared));
     }},
    {"ldmatrix_of_what_nobody_wrote", 32,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       uint32_t d[1];
       if (threadIdx.x != 5) sts(shared + threadIdx.x * 16, uint4{});
       __syncwarp();
       ldmatrix_x1(d, shared + threadIdx.x * 16);
     }},
    {"cp_async_read_before_its_wait", 32,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       if (threadIdx.x == 3) cp_async16(shared, in), cp_async_commit(), lds<int>(shared);
     }},
    {"cp_async_wait_for_one_group_too_few", 1,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       cp_async16(shared, in), cp_async_commit();
       cp_async16(shared + 16, in), cp_async_commit();
       cp_async_wait<1>();
       lds<int>(shared), lds<int>(shared + 16);
     }},
    {"cp_async_without_a_commit", 1,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       cp_async16(shared, in), cp_async_wait<0>(), lds<int>(shared);
     }},
    // ---- races
    {"cp_async_of_another_thread_without_a_barrier", 32,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       if (threadIdx.x == 0) cp_async16(shared, in), cp_async_commit(), cp_async_wait<0>();
       shfl_xor(0, 1);
       lds<int>(shared);
     }},
    {"write_under_a_cp_async", 1,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       cp_async16(shared, in), sts(shared, 1);
     }},
    {"cp_async_over_what_another_warp_reads", 64,
     [](const int* in, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + threadIdx.x * 4, 1);
       __syncthreads();
       if (threadIdx.x < 32)
         lds<int>(shared);
       else if (threadIdx.x == 32)
         cp_async16(shared, in);
     }},
    {"neighbours_value_without_syncwarp", 32,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + threadIdx.x * 4, 1);
       shfl_xor(0, 1);  // lanes meet, but memory is not ordered
       lds<int>(shared + (threadIdx.x ^ 1) * 4);
     }},
    {"ldmatrix_without_syncwarp", 32,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       uint32_t d[4];
       sts(shared + threadIdx.x * 16, uint4{});
       ldmatrix_x4(d, shared + threadIdx.x * 16);
     }},
    {"syncwarp_where_syncthreads_is_needed", 64,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + threadIdx.x * 4, 1);
       __syncthreads();
       sts(shared + threadIdx.x * 4, 2);
       __syncwarp();
       lds<int>(shared + (threadIdx.x ^ 32) * 4);
     }},
    {"write_over_what_another_warp_reads", 64,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared + threadIdx.x * 4, 1);
       __syncthreads();
       lds<int>(shared + (threadIdx.x ^ 32) * 4);
       sts(shared + threadIdx.x * 4, 2);
     }},
    {"two_threads_write_the_same", 32,
     [](const int*, int*) {
       SHARED_DYNAMIC(shared);
       sts(shared, int(threadIdx.x));
     }},
    // ---- threads that do not arrive
    {"half_a_warp_at_a_shuffle", 32,
     [](const int*, int*) {
       if (threadIdx.x < 16) shfl_xor(0, 1);
     }},
    {"two_instructions_meet", 32,
     [](const int*, int*) {
       if (threadIdx.x < 16)
         shfl_xor(0, 1);
       else
         __syncwarp();
     }},
    {"shuffle_from_outside_the_mask", 32,
     [](const int*, int*) {
       if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 0, 16);
     }},
    {"lane_outside_its_own_mask", 32, [](const int*, int*) { __syncwarp(0xffffu); }},
    {"warp_that_misses_the_barrier", 128,
     [](const int*, int*) {
       if (threadIdx.x / 32 != 2) __syncthreads();
     }},
    {"mma_of_half_a_warp", 16,
     [](const int*, int*) {
       int c[2] = {};
       mma_m8n8k32_s4(c, {0}, {0});
     }},
    // ---- all is well
    {"right_synchronisation", 64,
     [](const int*, int* out) {
       SHARED_DYNAMIC(shared);
       const int t = threadIdx.x;
       sts(shared + t * 4, t);
       __syncwarp();
       int v = lds<int>(shared + (t ^ 1) * 4);
       if (t % 32 < 16) v += __shfl_xor_sync(0xffffu, v, 2);
       __syncthreads();
       sts(shared + (t ^ 32) * 4, v);
       __syncthreads();
       stg(out + t, lds<int>(shared + t * 4));
     }},
    {"right_pipeline", 64,
     [](const int* in, int* out) {
       SHARED_DYNAMIC(shared);
       const int t = threadIdx.x;
       for (int stage = 0; stage < 2; ++stage)
         cp_async4(shared + stage * 256 + t * 4, in + t + stage), cp_async_commit();
       int sum = 0;
       for (int step = 0; step < 4; ++step) {
         cp_async_wait<1>();
         __syncthreads();
         sum += lds<int>(shared + step % 2 * 256 + (t ^ 63) * 4);
         __syncthreads();
         cp_async4(shared + step % 2 * 256 + t * 4, in + t + step + 2), cp_async_commit();
       }
       stg(out + t, sum);
     }},
};

}  // namespace

SIMT_EXPORT const char* diagnose(simt::Call& call, const char* name, simt::Array in, simt::Array out) {
  return simt::run(call, [&] {
    const simt::Input<int> from("in", in);
    const simt::Output<int> to("out", out);
    for (const Case& c : cases)
      if (!std::strcmp(c.name, name)) return launch(c.kernel, 1, c.threads, 1024, nullptr, from.data(), to.data());
    throw simt::Error(std::string("no case is called ") + name);
  });
}

SIMT_EXPORT const char* launch_nothing(simt::Call& call, int threads, int shared_bytes) {
  return simt::run(call, [&] { launch(+[] {}, 1, threads, shared_bytes, nullptr); });
}
