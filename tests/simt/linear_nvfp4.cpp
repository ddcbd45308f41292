// linear_w4a4 on NVFP4, with every ending, for test_linear_nvfp4.py: by its host functions, but for the choice of tile
// of the plain one.
#include "call.h"
#include "cuda/linear/next.cuh"
#include "cuda/linear_w4a4/nvfp4.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

#define OPERANDS                                                                                                    \
  Array qx, Array sx, Array qw, Array sw, Array channel_scales, Array h, Array up, Array bias, int m, int n, int k, \
      int r
#define OPERAND_NAMES qx, sx, qw, sw, channel_scales, h, up, bias, m, n, k, r

// A call's operands, with the names that faults are told by.
template <class T>
struct Operand {
  Input<uint8_t> x, w, scales_x, scales_w;
  Input<float> scales_channel, hidden, b;
  Input<T> branch;
  LinearArguments arguments;

  Operand(OPERANDS)
      : x("qx", qx),
        w("qw", qw),
        scales_x("sx", sx),
        scales_w("sw", sw),
        scales_channel("channel_scales", channel_scales),
        hidden("h", h),
        b("bias", bias),
        branch("up", up) {
    arguments.m = m, arguments.n = n, arguments.k = k, arguments.r = r;
    arguments.type = std::is_same_v<T, bf16> ? Type::bf16 : Type::f16, arguments.codes = Codes::nvfp4;
    arguments.qx = x.data(), arguments.qw = w.data(), arguments.sx = scales_x.data(), arguments.sw = scales_w.data();
    arguments.channel_scales = scales_channel.data(), arguments.h = hidden.data(), arguments.bias = b.data();
    arguments.up = branch.data();
  }
};

template <class Tile, class T>
void run_linear(const Calls<StoreArguments>& calls) {
  launch_group<Tile, Nvfp4>(
      linear_kernel<Tile, Nvfp4, T, Store<T>>, calls, 0,
      [](const LinearArguments& a, const StoreArguments& to) { return ending_of<T>(a, to); },
      [](const LinearArguments& a) { return pieces(a.n, Tile::BN); }, [](const LinearArguments&) { return 0; });
}

template <class Tile, class T>
const char* linear(Call& call, OPERANDS, Array y) {
  return simt::run(call, [&] {
    const Operand<T> in(OPERAND_NAMES);
    const Output<T> out("y", y);
    run_linear<Tile, T>({{in.arguments, {out.data()}}});
  });
}
#define EXPORT(name, TILE, T)                                   \
  SIMT_EXPORT const char* name(Call& call, OPERANDS, Array y) { \
    return linear<TILE, T>(call, OPERAND_NAMES, y);             \
  }
EXPORT(large_bfloat16, Large, bf16)
EXPORT(large_float16, Large, f16)
EXPORT(medium_bfloat16, Medium, bf16)
EXPORT(medium_float16, Medium, f16)
EXPORT(small_bfloat16, Small, bf16)
EXPORT(small_float16, Small, f16)

template <class T>
const char* run_gate_residual(Call& call, OPERANDS, Array gate, Array residual, Array y, int samples) {
  return simt::run(call, [&] {
    const Operand<T> in(OPERAND_NAMES);
    const Input<T> by("gate", gate), to("residual", residual);
    const Output<T> out("y", y);
    launch_linear<T, Nvfp4>(Calls<GateResidualArguments>{{in.arguments, {by.data(), to.data(), samples, out.data()}}});
  });
}
SIMT_EXPORT const char* gate_residual(Call& call, OPERANDS, Array gate, Array residual, Array y, int samples) {
  return run_gate_residual<bf16>(call, OPERAND_NAMES, gate, residual, y, samples);
}

SIMT_EXPORT const char* qkv_rope(Call& call, OPERANDS, Array q_norm, Array k_norm, Array rotary, Array q, Array key,
                                 Array v, int head_dim, int tokens, float eps) {
  return simt::run(call, [&] {
    const Operand<f16> in(OPERAND_NAMES);
    const Input<float> of_q("q_norm", q_norm), of_k("k_norm", k_norm), turns("rotary", rotary);
    const Output<f16> to_q("q", q), to_k("k", key), to_v("v", v);
    launch_linear<f16, Nvfp4>(Calls<QkvRopeArguments>{
        {in.arguments,
         {of_q.data(), of_k.data(), turns.data(), head_dim, tokens, eps, to_q.data(), to_k.data(), to_v.data()}}});
  });
}

template <template <class> class Z, class T>
const char* run_next(Call& call, OPERANDS, Array inv_smooth, Array down, Array next_qx, Array next_sx, Array next_h,
                     int ranks, int activation, int gate_first) {
  return simt::run(call, [&] {
    const Operand<T> in(OPERAND_NAMES);
    const Input<float> smooth("inv_smooth", inv_smooth);
    const Input<T> next_down("down", down);
    const Output<uint8_t> codes("next_qx", next_qx), scales("next_sx", next_sx);
    const Output<float> hidden("next_h", next_h);
    const simt::Buffer<float> parts("parts", size_t(parts_of<Z>(0, std::vector<Problem>{{m, n}})[0]) * m * ranks, true);
    NextArguments to;
    to.activation = Activation(activation), to.gate_first = gate_first, to.codes = Codes::nvfp4, to.r = ranks;
    to.inv_smooth = smooth.data(), to.down = next_down.data(), to.parts = parts.data();
    to.qx = codes.data(), to.sx = scales.data(), to.h = hidden.data();
    launch_next<Z, Nvfp4, T>({{in.arguments, to}});
  });
}
#define EXPORT_NEXT(name, Z, T)                                                                                  \
  SIMT_EXPORT const char* name(Call& call, OPERANDS, Array inv_smooth, Array down, Array next_qx, Array next_sx, \
                               Array next_h, int ranks, int activation, int gate_first) {                        \
    return run_next<Z, T>(call, OPERAND_NAMES, inv_smooth, down, next_qx, next_sx, next_h, ranks, activation,    \
                          gate_first);                                                                           \
  }
EXPORT_NEXT(gelu_quantize_bfloat16, Plain, bf16)
EXPORT_NEXT(gelu_quantize_float16, Plain, f16)
EXPORT_NEXT(glu_quantize_bfloat16, Gated, bf16)
EXPORT_NEXT(glu_quantize_float16, Gated, f16)
