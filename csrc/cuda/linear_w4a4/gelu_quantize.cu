// z = activation(acc + h·upᵀ + bias), quantized for the next linear, with its h
#include "cuda/linear_w4a4/next.cuh"

namespace nunchaku_py::cuda {

int gelu_parts(int device, int m, int n) {
  return parts_of<Plain>(device, m, n, n);
}

void linear_w4a4_gelu_quantize(const LinearArguments& a, const NextArguments& to) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) {
    launch_next<Plain, T>(a, to, a.n, 0, [&]<class Z> { return Z{to.activation}; });
  });
}

}  // namespace nunchaku_py::cuda
