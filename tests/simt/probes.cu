// The probes as device code: what tests/test_cuda_compile.py compiles for every target, and reads.
#include "probes.cuh"

namespace nunchaku_py::cuda {

#define INSTANTIATE(name, sum, ...) \
  template __global__ void mma_probe<probe_##name>(const uint32_t*, const uint32_t*, sum*, int);
FOR_EACH_MMA(INSTANTIATE)
INSTANTIATE(mma_m16n8k64_nvf4, float)
INSTANTIATE(mma_m16n8k64_nvf4_selected, float)
template __global__ void shuffle_probe<float>(const float*, const int*, float*);

void launch_probes(uint32_t* words, float* floats, int* numbers, stream_t stream) {
  auto* const vectors = reinterpret_cast<uint4*>(words);
  launch(ldmatrix_probe, 1, 32, 512, stream, vectors, words, words, words);
  launch(copy_probe, 1, 32, 1024, stream, vectors, numbers, vectors, reinterpret_cast<uint2*>(words), words);
  launch(narrow_probe, 1, 32, 0, stream, floats, words, words, words, words, words, 32);
  launch(widen_probe, 1, 32, 0, stream, words, floats, 32);
  launch(approx_probe, 1, 32, 0, stream, floats, floats, 32);
}

}  // namespace nunchaku_py::cuda
