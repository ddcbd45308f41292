// y = residual + gate·(acc + h·upᵀ + bias)
#include "cuda/linear_w4a8/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a8_gate_residual(const Calls<GateResidualArguments>& calls) {
  launch_w4a8(calls);
}

}  // namespace nunchaku_py::cuda
