// The CUDA ops as the native module has them, running on the host, on tensors in host memory: for test_native.py.
#include "bind_cuda.h"
#include "call.h"
#include "cuda/linear_w4a16/linear_w4a16.cu"
#include "cuda/linear_w4a4/gate_residual.cu"
#include "cuda/linear_w4a4/gelu_quantize.cu"
#include "cuda/linear_w4a4/glu_quantize.cu"
#include "cuda/linear_w4a4/linear_w4a4.cu"
#include "cuda/linear_w4a4/qkv_rope.cu"
#include "cuda/linear_w4a8/expand.cu"
#include "cuda/linear_w4a8/gate_residual.cu"
#include "cuda/linear_w4a8/gelu_quantize.cu"
#include "cuda/linear_w4a8/glu_quantize.cu"
#include "cuda/linear_w4a8/linear_w4a8.cu"
#include "cuda/linear_w4a8/qkv_rope.cu"
#include "cuda/norm_modulate_quantize/norm_modulate_quantize.cu"
#include "cuda/quantize_act/quantize_act.cu"

namespace {

// Tensors lie anywhere: what is checked here is the way to the kernels, not their indices.
const simt::Range everywhere = {reinterpret_cast<const char*>(simt::kMoat),
                                reinterpret_cast<const char*>(std::uintptr_t(1) << 56), true, "memory"};

}  // namespace

PYBIND11_MODULE(native_on_host, m) {
  simt::ranges.push_back(everywhere);
  simt::options.race = false;
  nunchaku_py::cuda::bind_cuda(m.def_submodule("cuda"));
  using namespace nunchaku_py::cuda;
  m.def(
      "choose", [](const Sizes& sizes, int places, int capability) {
        return int(choose(problems(sizes), {places, capability}));
      });
  m.def("tiles_of_block", &tiles_of_block);
  m.def("choose_sm90", [](const Sizes& sizes, int places, bool whole_heads) {
    return choose_sm90(problems(sizes), {places, SM90}, whole_heads);
  });
}
