// z = value·activation(gate) of the two halves of acc + h·upᵀ + bias, quantized for the next linear, with its h. A tile
// has 64 columns of each half.
#include "cuda/linear_w4a4/next.cuh"

namespace nunchaku_py::cuda {

int glu_parts(int device, int m, int n) {
  return parts_of<Gated>(device, m, n, n / 2);
}

void linear_w4a4_glu_quantize(const LinearArguments& a, const NextArguments& to) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) {
    launch_next<Gated, T>(a, to, a.n / 2, a.n / 2 - GROUP, [&]<class Z> { return Z{to.activation, to.gate_first}; });
  });
}

}  // namespace nunchaku_py::cuda
