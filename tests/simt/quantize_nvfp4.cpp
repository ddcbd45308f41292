// quantize_act and norm_modulate_quantize to NVFP4, by their host functions, for test_quantize_nvfp4.py.
#include "call.h"
#include "cuda/norm_modulate_quantize/source.cuh"
#include "cuda/quantize_act/host.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

// What both ops are called with: launch(arguments) while the buffers live.
template <class T, class Launch>
const char* quantize(Call& call, Array x, Array inv_smooth, Array down, Array qx, Array sx, Array h, int m, int k,
                     int r, Launch launch) {
  return simt::run(call, [&] {
    const Input<T> in("x", x), in_down("down", down);
    const Input<float> smooth("inv_smooth", inv_smooth);
    const Output<uint8_t> codes("qx", qx), scales("sx", sx);
    const Output<float> hidden("h", h);
    QuantizeArguments a;
    a.m = m, a.k = k, a.r = r, a.codes = Codes::nvfp4;
    a.x = in.data(), a.inv_smooth = smooth.data(), a.down = in_down.data();
    a.qx = codes.data(), a.sx = scales.data(), a.h = hidden.data();
    launch(a);
  });
}

#define EXPORT(name, T)                                                                                               \
  SIMT_EXPORT const char* name(Call& call, Array x, Array inv_smooth, Array down, Array qx, Array sx, Array h, int m, \
                               int k, int r) {                                                                        \
    return quantize<T>(call, x, inv_smooth, down, qx, sx, h, m, k, r,                                                 \
                       [](const QuantizeArguments& a) { launch_codes<T, InGroups<ToNvfp4>>(a, AsItIs<T>{}); });       \
  }
EXPORT(bfloat16, bf16)
EXPORT(float16, f16)

#define EXPORT_NORMED(name, T, RMS)                                                                                   \
  SIMT_EXPORT const char* name(Call& call, Array x, Array weight, Array scale, Array shift, Array inv_smooth,         \
                               Array down, Array qx, Array sx, Array h, int m, int k, int r, int rows_of_sample,      \
                               float eps) {                                                                           \
    return quantize<T>(call, x, inv_smooth, down, qx, sx, h, m, k, r, [&](const QuantizeArguments& a) {               \
      const Input<T> by("norm_weight", weight), grow("scale", scale), add("shift", shift);                            \
      launch_codes<T, InGroups<ToNvfp4>>(a, Normed<T, RMS>{by.data(), grow.data(), add.data(), rows_of_sample, eps}); \
    });                                                                                                               \
  }
EXPORT_NORMED(layer, bf16, false)
EXPORT_NORMED(rms, f16, true)
