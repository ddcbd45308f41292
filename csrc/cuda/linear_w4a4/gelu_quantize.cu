// z = activation(acc + h·upᵀ + bias), quantized for the next linear, with its h
#include "cuda/linear_w4a4/next.cuh"

namespace nunchaku_py::cuda {

std::vector<int> gelu_parts(int device, const std::vector<Problem>& problems) {
  return parts_of<Plain>(device, problems);
}

void linear_w4a4_gelu_quantize(const Calls<NextArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) { launch_next<Plain, T>(calls); });
}

}  // namespace nunchaku_py::cuda
