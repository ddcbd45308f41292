// q, k, v of acc + h·upᵀ + bias; q and k normed by head and turned. Its input is signed: it follows no GELU.
#include "cuda/linear_w4a4/host.cuh"

namespace nunchaku_py::cuda {

void linear_w4a4_qkv_rope(const Calls<QkvRopeArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    with_signed_numbers<T>(common(calls).codes, [&]<class Numbers>() { launch_linear<T, Numbers>(calls); });
  });
}

}  // namespace nunchaku_py::cuda
