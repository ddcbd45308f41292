// z = value·activation(gate) of the two halves of acc + h·upᵀ + bias, quantized for the next linear, with its h. A tile
// has 64 columns of each half.
#include "cuda/linear_w4a4/next.cuh"

namespace nunchaku_py::cuda {

std::vector<int> glu_parts(int device, const std::vector<Problem>& problems) {
  return parts_of<Gated>(device, problems);
}

void linear_w4a4_glu_quantize(const Calls<NextArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) { launch_next<Gated, T>(calls); });
}

}  // namespace nunchaku_py::cuda
