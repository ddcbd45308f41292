// The kernel of linear_w4a4 for sm_80 for test_linear_w4a4.py.
#include "call.h"
#include "cuda/linear_w4a4/config.h"
#include "cuda/linear_w4a4/kernel_sm80.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

struct Sizes {
  int m, n, k, r;
};

template <class Tile, bool UNSIGNED, class T, class Epilogue>
void run_linear(const Operands<T>& in, const LowRank<T>& branch, const float* bias, const Epilogue& epilogue) {
  const dim3 grid{unsigned(in.M + Tile::BM - 1) / Tile::BM, unsigned(in.N + Tile::BN - 1) / Tile::BN};
  launch(linear_w4a4_kernel<Tile, UNSIGNED, T, Epilogue>, grid, Tile::THREADS, shared_bytes<Tile>(), nullptr,
         Linear<T>{in, branch, bias}, epilogue);
}

template <class Tile, bool UNSIGNED, class T>
const char* linear(Call& call, Array qx, Array sx, Array qw, Array sw, Array h, Array up, Array bias, Array y,
                   Sizes s) {
  return simt::run(call, [&] {
    const Input<uint8_t> x("qx", qx), w("qw", qw);
    const Input<T> scales_x("sx", sx), scales_w("sw", sw), branch_up("up", up);
    const Input<float> hidden("h", h), b("bias", bias);
    const Output<T> out("y", y);
    run_linear<Tile, UNSIGNED, T>({x.data(), w.data(), scales_x.data(), scales_w.data(), s.m, s.n, s.k},
                                  {hidden.data(), branch_up.data(), s.r}, b.data(), Store<T>{out.data(), s.n});
  });
}

#define EXPORT(name, TILE, UNSIGNED, T)                                                                           \
  SIMT_EXPORT const char* name(Call& call, Array qx, Array sx, Array qw, Array sw, Array h, Array up, Array bias, \
                               Array y, int m, int n, int k, int r) {                                             \
    return linear<TILE, UNSIGNED, T>(call, qx, sx, qw, sw, h, up, bias, y, {m, n, k, r});                         \
  }
EXPORT(large_int4_bfloat16, Large, false, bf16)
EXPORT(large_uint4_float16, Large, true, f16)
EXPORT(medium_int4_bfloat16, Medium, false, bf16)
EXPORT(small_int4_float16, Small, false, f16)
EXPORT(small_uint4_bfloat16, Small, true, bf16)
