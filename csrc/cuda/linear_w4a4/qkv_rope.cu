// q, k, v of acc + h·upᵀ + bias; q and k normed by head and turned. Its input is signed: it follows no GELU.
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4_qkv_rope(const Calls<QkvRopeArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    launch_linear<T, false, QkvRope<T>>(calls, [](const LinearArguments& a, const QkvRopeArguments& to) {
      return QkvRope<T>{{static_cast<T*>(to.q), static_cast<T*>(to.k), static_cast<T*>(to.v)},
                        {to.q_norm, to.k_norm},
                        to.rotary,
                        a.n,
                        to.head_dim,
                        to.tokens,
                        to.eps};
    });
  });
}

}  // namespace nunchaku_py::cuda
