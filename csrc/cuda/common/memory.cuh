// Plain loads and stores, of global memory (ldg, stg) and of shared memory (lds, sts). T says how many bytes go at
// once; the address is a multiple of its size.
#pragma once
#include "cuda/common/platform.cuh"

namespace nunchaku_py::cuda {

template <class T>
DEVICE T ldg(const void* global) {
#ifndef __CUDACC__
  simt::check_global(global, sizeof(T), alignof(T), simt::Access::read);
#endif
  return *static_cast<const T*>(global);
}

template <class T>
DEVICE void stg(void* global, T value) {
#ifndef __CUDACC__
  simt::check_global(global, sizeof(T), alignof(T), simt::Access::write);
#endif
  *static_cast<T*>(global) = value;
}

template <class T>
DEVICE T lds(const void* shared) {
#ifndef __CUDACC__
  simt::touch_shared(shared, sizeof(T), simt::Access::read);
#endif
  return *static_cast<const T*>(shared);
}

template <class T>
DEVICE void sts(void* shared, T value) {
#ifndef __CUDACC__
  simt::touch_shared(shared, sizeof(T), simt::Access::write);
#endif
  *static_cast<T*>(shared) = value;
}

// The larger of a float in memory and of another, neither of which is negative: their bits are ordered as they are, NaN
// above all. The result does not depend on who comes first.
DEVICE void atomic_max(float* global, float value) {
  const int bits = value <= 0x1.fffffep127f ? __builtin_bit_cast(int, value) : 0x7fffffff;
#ifndef __CUDACC__
  simt::check_global(global, sizeof(int), alignof(int), simt::Access::write);
  simt::atomic_max(reinterpret_cast<int*>(global), bits);
#else
  asm volatile("red.global.max.s32 [%0], %1;" ::"l"(global), "r"(bits) : "memory");
#endif
}

#ifdef __CUDACC__
// What instructions want for a pointer to shared memory.
DEVICE uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}
#endif

}  // namespace nunchaku_py::cuda
