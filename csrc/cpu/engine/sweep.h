// GPTQ's column loop: rounds up to sweep_columns columns one after the other, each taking up the errors of those
// before.
//
//   c_j ← c_j − Σ_{i<j} U_ij·e_i (i ascending);   q = step·round(c_j·inverse);   e_j = (c_j − q)/U_jj;   c_j ← q
//
// Rows of the weight are independent and lie next to each other, so that they fill the vectors: what a lane computes
// depends neither on its neighbours nor on the thread that it meets.
#pragma once
#include "quantize.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

// The nearest value of e2m1 to v in [−6, 6], ties to the even code: steps of 1/2 below 2, of 1 below 4, then of 2. What
// is cut off at 2 and at 4 is taken off exactly.
inline F nearest_e2m1(F v) {
  const F two = Simd::set1(2), half = Simd::set1(0.5f), low = Simd::set1(-2);
  const F a = Simd::min(Simd::max(v, low), two), rest = Simd::sub(v, a);
  const F b = Simd::min(Simd::max(rest, low), two), c = Simd::sub(rest, b);
  return Simd::add(Simd::add(Simd::mul(Simd::round(Simd::mul(a, two)), half), Simd::round(b)),
                   Simd::mul(Simd::round(Simd::mul(c, half)), two));
}

// v, a weight over its scale, at the nearest value of a code; 0 never has a sign.
template <bool e2m1>
inline F nearest_code(F v) {
  const float most = e2m1 ? 6 : 7;
  v = Simd::min(Simd::max(v, Simd::set1(-most)), Simd::set1(most));
  return e2m1 ? nearest_e2m1(v) : Simd::add(Simd::round(v), Simd::zero());
}

template <bool e2m1>
class Sweep {
 public:
  explicit Sweep(const SweepArguments& arguments) : a(arguments) {}

  void run() const {
    parallel(a.threads, (a.n + strip - 1) / strip, [&](std::int64_t item) { round_strip(item * strip); });
  }

 private:
  static constexpr std::int64_t vectors = 2, strip = vectors * W, panel = W == 16 ? 8 : 4;

  void round_strip(std::int64_t first) const {
    alignas(64) float errors[sweep_columns * strip];
    const std::int64_t rows = smaller(strip, a.n - first);
    std::int64_t j = 0;
    for (; j + panel <= a.k; j += panel) round_panel<panel>(errors, first, rows, j);
    for (; j < a.k; j++) round_panel<1>(errors, first, rows, j);
  }

  template <std::int64_t columns>
  void round_panel(float* errors, std::int64_t first, std::int64_t rows, std::int64_t begin) const {
    F c[columns][vectors];
    for (std::int64_t p = 0; p < columns; p++)
      for (std::int64_t v = 0; v < vectors; v++)
        c[p][v] = load_rows(a.columns + (begin + p) * a.stride + first, rows, v);
    for (std::int64_t i = 0; i < begin; i++) {
      const float* upper = a.upper + i * a.upper_stride + begin;
      F e[vectors];
      for (std::int64_t v = 0; v < vectors; v++) e[v] = Simd::load(errors + i * strip + v * W);
#pragma GCC unroll 8
      for (std::int64_t p = 0; p < columns; p++) {
        const F by = Simd::set1(-upper[p]);
#pragma GCC unroll 2
        for (std::int64_t v = 0; v < vectors; v++) c[p][v] = Simd::fma(e[v], by, c[p][v]);
      }
    }
    for (std::int64_t p = 0; p < columns; p++) {
      const std::int64_t j = begin + p;
      const float* upper = a.upper + j * a.upper_stride;
      for (std::int64_t v = 0; v < vectors; v++) {
        const F e = round_column(c[p][v], upper[j], first, rows, j, v);
        Simd::store(errors + j * strip + v * W, e);
        for (std::int64_t q = p + 1; q < columns; q++)
          c[q][v] = Simd::fma(e, Simd::set1(-upper[begin + q]), c[q][v]);
      }
    }
  }

  // Stores what column j becomes and its error, which it returns.
  F round_column(F c, float diagonal, std::int64_t first, std::int64_t rows, std::int64_t j, std::int64_t v) const {
    const std::int64_t place = a.group[j] * a.n + first;
    const F step = load_rows(a.step + place, rows, v), inverse = load_rows(a.inverse + place, rows, v);
    const F rounded = Simd::mul(nearest_code<e2m1>(Simd::mul(c, inverse)), step);
    const F e = Simd::div(Simd::sub(c, rounded), Simd::set1(diagonal));
    store_rows(a.columns + j * a.stride + first, rounded, rows, v);
    store_rows(a.errors + j * a.error_stride + first, e, rows, v);
    return e;
  }

  static F load_rows(const float* from, std::int64_t rows, std::int64_t v) {
    return rows > v * W ? load_some(from + v * W, Type::f32, rows - v * W) : Simd::zero();
  }
  static void store_rows(float* to, F a, std::int64_t rows, std::int64_t v) {
    if (rows > v * W) store_some(to + v * W, Type::f32, a, rows - v * W);
  }

  const SweepArguments& a;
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
