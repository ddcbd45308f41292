// z = activation(acc + h·upᵀ + bias), quantized for the next linear, with its h
#include "cuda/linear/next.cuh"
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

std::vector<int> gelu_parts(int device, const std::vector<Problem>& problems) {
  return parts_of<Plain>(device, problems);
}

void linear_w4a4_gelu_quantize(const Calls<NextArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    with_signed_numbers<T>(common(calls).codes, [&]<class Numbers>() { launch_next<Plain, Numbers, T>(calls); });
  });
}

}  // namespace nunchaku_py::cuda
