// The kernel of norm_modulate_quantize for test_norm_modulate_quantize.py.
#include "call.h"
#include "cuda/norm_modulate_quantize/source.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

template <class T, bool RMS>
const char* quantize(Call& call, Array x, Array weight, Array scale, Array shift, Array inv_smooth, Array down,
                     Array qx, Array sx, Array h, int m, int k, int r, int rows_of_sample, float eps) {
  return simt::run(call, [&] {
    constexpr int WARPS = 4, RANKS = 32;
    using Source = Normed<T, RMS>;
    const Input<T> in("x", x), in_down("down", down), by("norm_weight", weight), grow("scale", scale),
        add("shift", shift);
    const Input<float> smooth("inv_smooth", inv_smooth);
    const Output<uint8_t> codes("qx", qx);
    const Output<T> scales("sx", sx);
    const Output<float> hidden("h", h);
    const QuantizeParams<T> p = {{codes.data(), scales.data(), m, k, false},
                                 in.data(),
                                 smooth.data(),
                                 in_down.data(),
                                 hidden.data(),
                                 nullptr,
                                 0,
                                 r};
    const dim3 grid{unsigned(m + 15) / 16, unsigned(std::max(1, (r + RANKS - 1) / RANKS))};
    launch(quantize_act_kernel<T, RANKS, WARPS, Source, InGroups<ToInt4<T>>>, grid, WARPS * 32,
           quantize_act_bytes<RANKS, WARPS>(), nullptr, p,
           Source{by.data(), grow.data(), add.data(), rows_of_sample, eps});
  });
}

#define EXPORT(name, T, RMS)                                                                                           \
  SIMT_EXPORT const char* name(Call& call, Array x, Array weight, Array scale, Array shift, Array inv_smooth,          \
                               Array down, Array qx, Array sx, Array h, int m, int k, int r, int rows_of_sample,       \
                               float eps) {                                                                            \
    return quantize<T, RMS>(call, x, weight, scale, shift, inv_smooth, down, qx, sx, h, m, k, r, rows_of_sample, eps); \
  }
EXPORT(layer, bf16, false)
EXPORT(rms, f16, true)
