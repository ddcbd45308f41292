// The kernel of linear_w4a4 for test_linear_w4a4.py.
#include "call.h"
#include "cuda/linear/config.h"
#include "cuda/linear/kernel.cuh"
#include "cuda/linear_w4a4/int4.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

struct Sizes {
  int m, n, k, r;
};

static const uint8_t* bytes(const void* p) {
  return static_cast<const uint8_t*>(p);
}

// A problem's operands, with the names that faults are told by.
template <class T>
struct Operand {
  Input<uint8_t> x, w;
  Input<T> scales_x, scales_w, up;
  Input<float> hidden, bias;
  Output<T> y;
  Sizes s;

  Operand(Array qx, Array sx, Array qw, Array sw, Array h, Array branch, Array b, Array out, Sizes sizes)
      : x("qx", qx),
        w("qw", qw),
        scales_x("sx", sx),
        scales_w("sw", sw),
        up("up", branch),
        hidden("h", h),
        bias("bias", b),
        y("y", out),
        s(sizes) {}

  Part<T, Store<T>> part() {
    return {{{bytes(x.data()), bytes(w.data()), bytes(scales_x.data()), bytes(scales_w.data()), nullptr, nullptr, s.m,
              s.n, s.k / 64},
             {hidden.data(), up.data(), s.r},
             bias.data()},
            {y.data(), s.n}};
  }
};

template <class Tile, bool UNSIGNED, class T>
void run_linears(std::initializer_list<Operand<T>*> operands) {
  Group<T, Store<T>> group;
  int i = 0, rows = 0, columns = 0;
  for (Operand<T>* const one : operands) {
    group.parts[i] = one->part(), group.first[i] = rows, ++i;
    rows += pieces(one->s.m, Tile::BM), columns = std::max(columns, pieces(one->s.n, Tile::BN));
  }
  launch(linear_kernel<Tile, Int4<T, UNSIGNED>, T, Store<T>>, dim3{unsigned(rows), unsigned(columns)}, Tile::THREADS,
         shared_bytes<Tile, Int4<T, UNSIGNED>, TARGET>(), nullptr, group);
}

template <class Tile, bool UNSIGNED, class T>
const char* linear(Call& call, Array qx, Array sx, Array qw, Array sw, Array h, Array up, Array bias, Array y,
                   Sizes s) {
  return simt::run(call, [&] {
    Operand<T> one(qx, sx, qw, sw, h, up, bias, y, s);
    run_linears<Tile, UNSIGNED, T>({&one});
  });
}

// Two problems of any sizes in one launch.
SIMT_EXPORT const char* two_medium_float16(Call& call, Array qx, Array sx, Array qw, Array sw, Array h, Array up,
                                           Array bias, Array y, int m, int n, int k, int r, Array qx2, Array sx2,
                                           Array qw2, Array sw2, Array h2, Array up2, Array bias2, Array y2, int m2,
                                           int n2, int k2, int r2) {
  return simt::run(call, [&] {
    Operand<f16> one(qx, sx, qw, sw, h, up, bias, y, {m, n, k, r});
    Operand<f16> two(qx2, sx2, qw2, sw2, h2, up2, bias2, y2, {m2, n2, k2, r2});
    run_linears<Medium, false, f16>({&one, &two});
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
EXPORT(medium_int4_float16, Medium, false, f16)
EXPORT(medium_uint4_float16, Medium, true, f16)
EXPORT(small_int4_float16, Small, false, f16)
EXPORT(small_uint4_bfloat16, Small, true, bf16)
