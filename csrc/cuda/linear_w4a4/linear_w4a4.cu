// y = acc + h·upᵀ + bias
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4(const LinearArguments& a, void* y) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) { launch_either<T>(a, Store<T>{static_cast<T*>(y), a.n}); });
}

}  // namespace nunchaku_py::cuda
