// The endings of linear_w4a4 for test_linear_w4a4_endings.py.
#include "call.h"
#include "cuda/linear/config.h"
#include "cuda/linear/next_act.cuh"
#include "cuda/linear_w4a4/int4.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;
using T = bf16;

// The operands that every ending has.
struct Common {
  Input<uint8_t> qx, qw;
  Input<T> sx, sw, up;
  Input<float> h, bias;
  Common(Array x, Array scales_x, Array w, Array scales_w, Array hidden, Array branch, Array b)
      : qx("qx", x),
        qw("qw", w),
        sx("sx", scales_x),
        sw("sw", scales_w),
        up("up", branch),
        h("h", hidden),
        bias("bias", b) {}
  Linear<T> linear(int m, int n, int k, int r, int jump = 0) {
    const auto bytes = [](const T* p) { return reinterpret_cast<const uint8_t*>(p); };
    return {{qx.data(), qw.data(), bytes(sx.data()), bytes(sw.data()), nullptr, nullptr, m, n, k / 64, jump},
            {h.data(), up.data(), r},
            bias.data()};
  }
};
#define COMMON Array qx, Array sx, Array qw, Array sw, Array h, Array up, Array bias, int m, int n, int k, int r
#define COMMON_ARRAYS qx, sx, qw, sw, h, up, bias

using Ordinary = Medium;
using Numbers = Int4<T, false>;

template <class Epilogue>
void run_linear(const Linear<T>& p, const Epilogue& epilogue) {
  const dim3 grid{unsigned(p.in.M + Ordinary::BM - 1) / Ordinary::BM,
                  unsigned(p.in.N + Ordinary::BN - 1) / Ordinary::BN};
  Group<T, Epilogue> group;
  group.parts[0] = {p, epilogue};
  launch(linear_kernel<Ordinary, Numbers, T, Epilogue>, grid, Ordinary::THREADS,
         shared_bytes<Ordinary, Numbers, TARGET>(), nullptr, group);
}

SIMT_EXPORT const char* gate_residual(Call& call, COMMON, Array gate, Array residual, Array y, int rows_of_sample) {
  return simt::run(call, [&] {
    Common in(COMMON_ARRAYS);
    const Input<T> by("gate", gate), to("residual", residual);
    const Output<T> out("y", y);
    run_linear(in.linear(m, n, k, r), GateResidual<T>{out.data(), by.data(), to.data(), n, rows_of_sample});
  });
}

SIMT_EXPORT const char* qkv_rope(Call& call, COMMON, Array q_norm, Array k_norm, Array rotary, Array q, Array key,
                                 Array v, int head_dim, int tokens, float eps) {
  return simt::run(call, [&] {
    Common in(COMMON_ARRAYS);
    const Input<float> of_q("q_norm", q_norm), of_k("k_norm", k_norm), turns("rotary", rotary);
    const Output<T> to_q("q", q), to_k("k", key), to_v("v", v);
    run_linear(in.linear(m, n, k, r), QkvRope<T>{{to_q.data(), to_k.data(), to_v.data()},
                                                 {of_q.data(), of_k.data()},
                                                 turns.data(),
                                                 n,
                                                 head_dim,
                                                 tokens,
                                                 eps});
  });
}

template <bool GATED>
const char* run_next(Call& call, COMMON, Array inv_smooth, Array down, Array next_qx, Array next_sx, Array next_h,
                     int width, int ranks, int activation, int option, float shift, int tiles) {
  return simt::run(call, [&] {
    using Z = std::conditional_t<GATED, Gated<Ordinary>, Plain<Ordinary>>;
    Common in(COMMON_ARRAYS);
    const Input<float> smooth("inv_smooth", inv_smooth);
    const Input<T> next_down("down", down);
    const Output<uint8_t> codes("next_qx", next_qx);
    const Output<T> scales("next_sx", next_sx);
    const Output<float> hidden("next_h", next_h);
    const int blocks = (width + Z::WIDTH * tiles - 1) / (Z::WIDTH * tiles);
    simt::Buffer<float> parts("parts", size_t(blocks) * m * ranks, true);
    const Z make = {Activation(activation), GATED && option};
    const NextAct<T> next = {{codes.data(), scales.data(), m, width, !GATED && option},
                             smooth.data(),
                             next_down.data(),
                             parts.data(),
                             shift,
                             ranks};
    const dim3 grid{unsigned(m + Ordinary::BM - 1) / Ordinary::BM, unsigned(blocks)};
    Group<T, Quantized<T, Z>> group;
    group.parts[0] = {in.linear(m, n, k, r, Z::jump_of(n)), {next, make, tiles}};
    launch(linear_next_kernel<Ordinary, Numbers, T, Z>, grid, Ordinary::THREADS,
           shared_bytes<Ordinary, Numbers, TARGET>(sizeof(Hidden<Ordinary, T>)), nullptr, group);
    launch(sum_hidden_kernel<128>, dim3{unsigned(m * ranks + 127) / 128}, 128, 0, nullptr, parts.data(), blocks,
           hidden.data(), m * ranks);
  });
}

#define EXPORT_NEXT(name, GATED)                                                                                      \
  SIMT_EXPORT const char* name(Call& call, COMMON, Array inv_smooth, Array down, Array next_qx, Array next_sx,        \
                               Array next_h, int width, int ranks, int activation, int option, float shift,           \
                               int tiles) {                                                                           \
    return run_next<GATED>(call, COMMON_ARRAYS, m, n, k, r, inv_smooth, down, next_qx, next_sx, next_h, width, ranks, \
                           activation, option, shift, tiles);                                                         \
  }
EXPORT_NEXT(gelu_quantize, false)
EXPORT_NEXT(glu_quantize, true)
