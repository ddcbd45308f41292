#include "cuda/norm_modulate_quantize/source.cuh"
#include "cuda/quantize_act/host.cuh"

namespace nunchaku_py::cuda {
namespace {

template <class T, bool RMS>
void launch_normed(const QuantizeArguments& a) {
  const auto typed = [](const void* p) { return static_cast<const T*>(p); };
  launch_quantize<T>(a, Normed<T, RMS>{typed(a.norm_weight), typed(a.scale), typed(a.modulate_shift),
                                       a.m / a.samples, a.eps});
}

}  // namespace

void norm_modulate_quantize(const QuantizeArguments& a) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) { a.norm == Norm::rms ? launch_normed<T, true>(a) : launch_normed<T, false>(a); });
}

}  // namespace nunchaku_py::cuda
