// q, k, v of acc + h·upᵀ + bias; q and k normed by head and turned
#include "cuda/linear_w4a8/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a8_qkv_rope(const Calls<QkvRopeArguments>& calls) {
  launch_w4a8(calls);
}

}  // namespace nunchaku_py::cuda
