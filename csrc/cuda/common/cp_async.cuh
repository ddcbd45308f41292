// cp.async: 16, 8 or 4 bytes from global to shared memory, past the registers. Of these, bytes beyond `bytes` become
// zero and are not read. A thread waits for the groups that it committed itself; what others copied takes a barrier
// after that.
#pragma once
#include "cuda/common/memory.cuh"

namespace nunchaku_py::cuda {

#ifdef __CUDACC__
// For sm_75, which has no cp.async: the copy is made at once.
template <class T>
DEVICE void copy_now(void* shared, const void* global, int bytes) {
  T value = {};
  if (bytes == sizeof(T)) {
    value = *static_cast<const T*>(global);
  } else {
    uint32_t words[sizeof(T) / 4] = {};
#pragma unroll
    for (int i = 0; i < int(sizeof(T)); ++i)
      if (i < bytes) words[i / 4] |= uint32_t(static_cast<const uint8_t*>(global)[i]) << i % 4 * 8;
    memcpy(&value, words, sizeof value);
  }
  *static_cast<T*>(shared) = value;
}
#endif

DEVICE void cp_async16(void* shared, const void* global, int bytes = 16) {
#ifndef __CUDACC__
  simt::copy_async(shared, global, 16, bytes);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  copy_now<uint4>(shared, global, bytes);
#endif
}

DEVICE void cp_async8(void* shared, const void* global, int bytes = 8) {
#ifndef __CUDACC__
  simt::copy_async(shared, global, 8, bytes);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  copy_now<uint2>(shared, global, bytes);
#endif
}

DEVICE void cp_async4(void* shared, const void* global, int bytes = 4) {
#ifndef __CUDACC__
  simt::copy_async(shared, global, 4, bytes);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  copy_now<uint32_t>(shared, global, bytes);
#endif
}

// What this thread copied since its last commit is a group.
DEVICE void cp_async_commit() {
#ifndef __CUDACC__
  ++simt::self->groups;
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when all groups of this thread have arrived but for the N that it committed last.
template <int N>
DEVICE void cp_async_wait() {
#ifndef __CUDACC__
  simt::wait_async(N);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace nunchaku_py::cuda
