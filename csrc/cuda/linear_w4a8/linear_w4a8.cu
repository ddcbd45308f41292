// y = acc + h·upᵀ + bias
#include "cuda/linear_w4a8/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a8(const Calls<StoreArguments>& calls) {
  launch_w4a8(calls);
}

}  // namespace nunchaku_py::cuda
