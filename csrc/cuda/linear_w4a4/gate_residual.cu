// y = residual + gate·(acc + h·upᵀ + bias)
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4_gate_residual(const Calls<GateResidualArguments>& calls) {
  launch_any_w4a4(calls);
}

}  // namespace nunchaku_py::cuda
