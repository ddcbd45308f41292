// y = residual + gate·(acc + h·upᵀ + bias)
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4_gate_residual(const LinearArguments& a, const GateResidualArguments& to) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) {
    launch_either<T>(a, GateResidual<T>{static_cast<T*>(to.y), static_cast<const T*>(to.gate),
                                        static_cast<const T*>(to.residual), a.n, a.m / to.samples});
  });
}

}  // namespace nunchaku_py::cuda
