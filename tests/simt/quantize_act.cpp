// The kernel of quantize_act for test_quantize_act.py.
#include "call.h"
#include "cuda/quantize_act/kernel.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

template <class T, int RANKS>
const char* quantize(Call& call, Array x, Array inv_smooth, Array down, Array qx, Array sx, Array h, float shift, int m,
                     int k, int r, int is_unsigned) {
  return simt::run(call, [&] {
    constexpr int WARPS = 4;
    const Input<T> in("x", x), in_down("down", down);
    const Input<float> smooth("inv_smooth", inv_smooth);
    const Output<uint8_t> codes("qx", qx);
    const Output<T> scales("sx", sx);
    const Output<float> hidden("h", h);
    const QuantizeParams<T> p = {{codes.data(), scales.data(), m, k, is_unsigned != 0},
                                 in.data(),
                                 smooth.data(),
                                 in_down.data(),
                                 hidden.data(),
                                 nullptr,
                                 shift,
                                 r};
    const dim3 grid{unsigned(m + 15) / 16, unsigned(std::max(1, (r + RANKS - 1) / RANKS))};
    launch(quantize_act_kernel<T, RANKS, WARPS, AsItIs<T>, InGroups<ToInt4<T>>>, grid, WARPS * 32,
           quantize_act_bytes<RANKS, WARPS>(), nullptr, p, AsItIs<T>{});
  });
}

#define EXPORT(name, T, RANKS)                                                                                 \
  SIMT_EXPORT const char* name(Call& call, Array x, Array inv_smooth, Array down, Array qx, Array sx, Array h, \
                               float shift, int m, int k, int r, int is_unsigned) {                            \
    return quantize<T, RANKS>(call, x, inv_smooth, down, qx, sx, h, shift, m, k, r, is_unsigned);              \
  }
EXPORT(bfloat16_16, bf16, 16)
EXPORT(bfloat16_32, bf16, 32)
EXPORT(bfloat16_64, bf16, 64)
EXPORT(bfloat16_128, bf16, 128)
EXPORT(float16_32, f16, 32)
