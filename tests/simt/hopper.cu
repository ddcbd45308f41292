// Hopper's instructions as device code: what tests/test_cuda_compile.py compiles for every target, and reads.
#include "hopper.cuh"
#include "hopper_pipeline.cuh"

namespace nunchaku_py::cuda {

#define INSTANTIATE(n)                                                                \
  template __global__ void wgmma_probe<n, false>(const __grid_constant__ WgmmaParams); \
  template __global__ void wgmma_probe<n, true>(const __grid_constant__ WgmmaParams);
INSTANTIATE(64)
INSTANTIATE(96)
INSTANTIATE(128)
INSTANTIATE(160)
INSTANTIATE(192)
INSTANTIATE(224)
INSTANTIATE(256)

void launch_probes(const void* matrix, int* out, stream_t stream) {
  const BoxParams box{tensor_map(matrix, 128, 128, 64, BOX_BYTES), reinterpret_cast<uint4*>(out), 0, 0, 128};
  launch_cluster(2, box_probe<BoxParams>, 2, WARPGROUP, 128 * BOX_BYTES + sizeof(Barrier), stream, box);
  launch_pipeline({matrix, matrix, out, 128, 64, 128}, 2, PipelineBug::none, stream);
}

}  // namespace nunchaku_py::cuda
