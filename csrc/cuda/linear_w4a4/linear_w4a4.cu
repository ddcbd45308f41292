// y = acc + h·upᵀ + bias
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4(const Calls<StoreArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    launch_either<T, Store<T>>(calls, [](const LinearArguments& a, const StoreArguments& to) {
      return Store<T>{static_cast<T*>(to.y), a.n};
    });
  });
}

}  // namespace nunchaku_py::cuda
