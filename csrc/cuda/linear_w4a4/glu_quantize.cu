// z = value·activation(gate) of the two halves of acc + h·upᵀ + bias, quantized for the next linear, with its h. A tile
// has 64 columns of each half.
#include "cuda/linear/next.cuh"
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

std::vector<int> glu_parts(int device, const std::vector<Problem>& problems) {
  return parts_of<Gated>(device, problems);
}

void linear_w4a4_glu_quantize(const Calls<NextArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    with_signed_numbers<T>(common(calls).codes, [&]<class Numbers>() { launch_next<Gated, Numbers, T>(calls); });
  });
}

}  // namespace nunchaku_py::cuda
