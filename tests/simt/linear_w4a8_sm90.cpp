// The Hopper kernel of linear_w4a8 for test_linear_w4a8_sm90.py: with races looked for, and every tile.
#include "call.h"
#include "cuda/linear_w4a8/host_sm90.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

// A linear's operands, with the names that faults are told by.
template <class T>
struct Operand {
  Input<uint8_t> x, w;
  Input<float> scales_x, scales_w, hidden, bias;
  Input<T> up;
  LinearArguments a;

  Operand(Array qx, Array sx, Array qw, Array sw, Array h, Array branch, Array b, int m, int n, int k, int r)
      : x("qx", qx),
        w("qw", qw),
        scales_x("sx", sx),
        scales_w("sw", sw),
        hidden("h", h),
        bias("bias", b),
        up("up", branch) {
    a.codes = Codes::int8, a.m = m, a.n = n, a.k = k, a.r = r;
    a.qx = x.data(), a.qw = w.data(), a.sx = scales_x.data(), a.sw = scales_w.data();
    a.h = hidden.data(), a.up = up.data(), a.bias = bias.data();
  }
};
#define OPERANDS Array qx, Array sx, Array qw, Array sw, Array h, Array up, Array bias, int m, int n, int k, int r
#define OPERAND_ARRAYS qx, sx, qw, sw, h, up, bias, m, n, k, r

template <class Tile, class T>
const char* stored(Call& call, OPERANDS, Array y) {
  return simt::run(call, [&] {
    Operand<T> in(OPERAND_ARRAYS);
    const Output<T> out("y", y);
    launch_tile_sm90<Tile, T, Store<T>>(
        Calls<StoreArguments>{{in.a, {out.data()}}},
        [](const LinearArguments& a, const StoreArguments& to) { return ending_of<T>(a, to); });
  });
}

// z and the tops of its rows.
template <class Tile, class T, class Made>
const char* activated(Call& call, OPERANDS, Array inv_smooth, Array z, Array tops) {
  return simt::run(call, [&] {
    Operand<T> in(OPERAND_ARRAYS);
    const Input<float> smooth("inv_smooth", inv_smooth);
    const Output<T> out("z", z);
    const Output<float> top("tops", tops);
    launch_tile_sm90<Tile, T, Activated<T, Made>>(
        Calls<NextArguments>{{in.a, {}}}, [&](const LinearArguments& a, const NextArguments&) {
          return Activated<T, Made>{out.data(), top.data(),        smooth.data(),
                                    a.m,        a.n / Made::PARTS, {Activation::silu, false}};
        });
  });
}

#define EXPORT(columns)                                                                                  \
  SIMT_EXPORT const char* stored_##columns(Call& call, OPERANDS, Array y) {                              \
    return stored<TileSm90<columns>, bf16>(call, OPERAND_ARRAYS, y);                                     \
  }                                                                                                      \
  SIMT_EXPORT const char* gated_##columns(Call& call, OPERANDS, Array inv_smooth, Array z, Array tops) { \
    return activated<TileSm90<columns>, f16, GatedSm90>(call, OPERAND_ARRAYS, inv_smooth, z, tops);      \
  }
EXPORT(256)
EXPORT(192)
EXPORT(128)

// Two linears in one launch.
SIMT_EXPORT const char* two(Call& call, OPERANDS, Array y, Array qx2, Array sx2, Array qw2, Array sw2, Array h2,
                            Array up2, Array bias2, int m2, int n2, int k2, int r2, Array y2) {
  return simt::run(call, [&] {
    using T = bf16;
    Operand<T> one(OPERAND_ARRAYS), other(qx2, sx2, qw2, sw2, h2, up2, bias2, m2, n2, k2, r2);
    const Output<T> out("y", y), out2("y2", y2);
    launch_tile_sm90<TileSm90<128>, T, Store<T>>(
        Calls<StoreArguments>{{one.a, {out.data()}}, {other.a, {out2.data()}}},
        [](const LinearArguments& a, const StoreArguments& to) { return ending_of<T>(a, to); });
  });
}
