// z = activation(acc + h·upᵀ + bias), quantized for the next linear, with its h
#include "cuda/linear_w4a8/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a8_gelu_quantize(const Calls<NextArguments>& calls) {
  launch_next_int8<Plain, PlainSm90>(calls);
}

}  // namespace nunchaku_py::cuda
