// The kernels of linear_w4a16 for test_linear_w4a16.py.
#include "call.h"
#include "cuda/linear_w4a16/few_rows.cuh"
#include "cuda/linear_w4a16/many_rows.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

constexpr int MANY = 0;  // ROWS of the other kernel

template <class T, int ROWS, bool SIGNED>
void launch_rows(const Decoded<T>& p) {
  const auto pieces = [](int size, int piece) { return unsigned((size + piece - 1) / piece); };
  if constexpr (ROWS == MANY)
    launch(many_rows_kernel<T, SIGNED>, dim3{pieces(p.M, ManyTile::BM), pieces(p.N, ManyTile::BN)}, ManyTile::THREADS,
           many_rows_bytes(), nullptr, p);
  else
    launch(few_rows_kernel<T, ROWS, SIGNED>, dim3{pieces(p.M, ROWS), pieces(p.N, FEW_WARPS * CHANNELS)}, FEW_WARPS * 32,
           0, nullptr, p);
}

template <class T, int ROWS, bool SIGNED>
const char* rows(Call& call, Array x, Array qw, Array scales, Array zeros, Array h, Array up, Array bias, Array y,
                 int m, int n, int k, int r, int group) {
  return simt::run(call, [&] {
    const Input<uint8_t> codes("qw", qw);
    const Input<T> in("x", x), of("scales", scales), zero("zeros", zeros), branch("up", up);
    const Input<float> hidden("h", h), b("bias", bias);
    const Output<T> out("y", y);
    launch_rows<T, ROWS, SIGNED>({in.data(), codes.data(), of.data(), SIGNED ? nullptr : zero.data(), hidden.data(),
                                  branch.data(), b.data(), out.data(), m, n, k, r, group});
  });
}

#define EXPORT(name, T, ROWS, SIGNED)                                                                       \
  SIMT_EXPORT const char* name(Call& call, Array x, Array qw, Array scales, Array zeros, Array h, Array up, \
                               Array bias, Array y, int m, int n, int k, int r, int group) {                \
    return rows<T, ROWS, SIGNED>(call, x, qw, scales, zeros, h, up, bias, y, m, n, k, r, group);            \
  }
EXPORT(int4_bfloat16, bf16, 1, true)
EXPORT(uint4_bfloat16, bf16, 4, false)
EXPORT(int4_float16, f16, 2, true)
EXPORT(int4_float16_many, f16, MANY, true)
#if !defined(SIMT_TARGET) || SIMT_TARGET >= 80
EXPORT(uint4_bfloat16_many, bf16, MANY, false)
#endif
