// y = residual + gate·(acc + h·upᵀ + bias)
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4_gate_residual(const Calls<GateResidualArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    launch_either<T, GateResidual<T>>(calls, [](const LinearArguments& a, const GateResidualArguments& to) {
      return GateResidual<T>{static_cast<T*>(to.y), static_cast<const T*>(to.gate),
                             static_cast<const T*>(to.residual), a.n, a.m / to.samples};
    });
  });
}

}  // namespace nunchaku_py::cuda
