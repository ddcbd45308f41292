// The kernel of linear_w4a16 for few rows for test_linear_w4a16.py.
#include "call.h"
#include "cuda/linear_w4a16/kernel.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

template <class T, int ROWS, bool SIGNED>
const char* few_rows(Call& call, Array x, Array qw, Array scales, Array zeros, Array h, Array up, Array bias, Array y,
                     int m, int n, int k, int r, int group) {
  return simt::run(call, [&] {
    const Input<uint8_t> codes("qw", qw);
    const Input<T> in("x", x), of("scales", scales), zero("zeros", zeros), branch("up", up);
    const Input<float> hidden("h", h), b("bias", bias);
    const Output<T> out("y", y);
    const FewRows<T> p = {in.data(), codes.data(), of.data(),  SIGNED ? nullptr : zero.data(), hidden.data(),
                          branch.data(), b.data(), out.data(), m, n, k, r, group};
    const dim3 grid{unsigned(n + FEW_WARPS * CHANNELS - 1) / (FEW_WARPS * CHANNELS), unsigned(m + ROWS - 1) / ROWS};
    launch(few_rows_kernel<T, ROWS, SIGNED>, grid, FEW_WARPS * 32, 0, nullptr, p);
  });
}

#define EXPORT(name, T, ROWS, SIGNED)                                                                             \
  SIMT_EXPORT const char* name(Call& call, Array x, Array qw, Array scales, Array zeros, Array h, Array up,       \
                               Array bias, Array y, int m, int n, int k, int r, int group) {                      \
    return few_rows<T, ROWS, SIGNED>(call, x, qw, scales, zeros, h, up, bias, y, m, n, k, r, group);              \
  }
EXPORT(int4_bfloat16, bf16, 1, true)
EXPORT(uint4_bfloat16, bf16, 4, false)
EXPORT(int4_float16, f16, 2, true)
