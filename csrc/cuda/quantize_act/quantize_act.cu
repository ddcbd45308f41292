#include "cuda/quantize_act/host.cuh"

namespace nunchaku_py::cuda {

void quantize_act(const QuantizeArguments& a) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) { launch_quantize<T>(a, AsItIs<T>{}); });
}

}  // namespace nunchaku_py::cuda
