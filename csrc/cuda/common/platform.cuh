// What kernels need of their compiler. nvcc makes device code of them; any other compiler makes host code, in which
// tests/simt plays the GPU. So that both do the same, kernels keep to this:
//   - memory is read and written through memory.cuh, cp_async.cuh and ldmatrix.cuh, never through a raw pointer;
//   - shared memory is SHARED_DYNAMIC, and what lives in a kernel needs no destructor;
//   - fmaf stands where fusion is wanted, as both compilers are told not to fuse a·b + c by themselves.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define DEVICE __device__ __forceinline__
#define SHARED_DYNAMIC(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#include "simt.h"
#define DEVICE inline
#define SHARED_DYNAMIC(name) unsigned char* const name = simt::self->block->shared()
#endif

namespace nunchaku_py::cuda {

// The compute capability that this pass of the compiler makes code for; the host model has every instruction, unless
// it is to be an older GPU.
#ifdef __CUDA_ARCH__
constexpr int TARGET = __CUDA_ARCH__ / 10;
#elif defined(SIMT_TARGET)
constexpr int TARGET = SIMT_TARGET;
#else
constexpr int TARGET = 1000;
#endif

// Whether there are wgmma and setmaxnreg: in code for sm_90a, neither for sm_90 nor for later GPUs. The host model has
// them.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HOPPER = TARGET >= 90;
#else
constexpr bool HOPPER = false;
#endif

#ifdef __CUDACC__
using stream_t = cudaStream_t;

inline void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next is told of this error
  throw std::runtime_error(std::string("a CUDA kernel could not be launched: ") + cudaGetErrorString(error));
}

// In clusters of so many blocks along x, of which the grid is a multiple.
template <class... P, class... A>
void launch_cluster(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream,
                    A&&... arguments) {
  constexpr size_t FREE = 48 << 10;  // more has to be asked for
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > FREE)
    check_launch(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = unsigned(cluster), size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &size, config.numAttrs = cluster > 1;  // GPUs before 9.0 know no clusters, not even of one block
  [&](P... parameters) {  // converts the arguments to the types of the parameters
    void* pointers[] = {&parameters..., nullptr};
    check_launch(cudaLaunchKernelExC(&config, function, pointers));
  }(static_cast<A&&>(arguments)...);
}
#else
using stream_t = void*;

template <class... P, class... A>
void launch_cluster(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t,
                    A&&... arguments) {
  simt::run_grid([kernel, ... parameters = static_cast<P>(arguments)] { kernel(parameters...); }, grid, block,
                 shared_bytes, cluster);
}
#endif

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, stream_t stream, A&&... arguments) {
  launch_cluster(1, kernel, grid, block, shared_bytes, stream, static_cast<A&&>(arguments)...);
}

}  // namespace nunchaku_py::cuda
