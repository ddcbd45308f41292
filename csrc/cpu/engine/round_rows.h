// What the alternation of branch and rounding needs of each row of R, from one pass over it: Ŵ − Q takes R's place, Q
// the plain rounding of R, and Σ_k signal·(Q − R)² + rounding·R² is the row's share of J. Bits of Ŵ − Q are those of
// nunchaku_py/tensor.py; a share is summed by lanes, then over them in fp64.
#pragma once
#include "sweep.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

template <bool e2m1>
class RoundRows {
 public:
  explicit RoundRows(const RoundArguments& arguments) : a(arguments) {}

  void run() const {
    constexpr std::int64_t together = 4;
    parallel(a.threads, (a.n + together - 1) / together, [&](std::int64_t item) {
      for (std::int64_t n = item * together; n < smaller((item + 1) * together, a.n); n++) a.cost[n] = round_row(n);
    });
  }

 private:
  static constexpr float row_top = 4 * 448.0f;  // a row's largest weight over its channel scale

  double round_row(std::int64_t n) const {
    float* r = a.r + n * a.k;
    const float channel = e2m1 ? channel_scale(top_of_some(r, 0, a.k)) : 1;
    F cost = Simd::zero();
    for (std::int64_t begin = 0; begin < a.k; begin += a.group) {
      const std::int64_t end = smaller(begin + a.group, a.k);
      const float top = top_of_some(r, begin, end), scale = stored((e2m1 ? top / channel : top) / (e2m1 ? 6 : 7));
      for (std::int64_t k = begin; k < end; k += W) cost = Simd::add(cost, round_some(r, n, k, scale, channel));
    }
    alignas(64) float lanes[W];
    Simd::store(lanes, cost);
    double total = 0;
    for (const float lane : lanes) total += lane;
    return total;
  }

  // W numbers of a row; groups are whole vectors, only the row may end within one.
  F round_some(float* r, std::int64_t n, std::int64_t k, float scale, float channel) const {
    const std::int64_t count = a.k - k;
    const F exact = load_some(r + k, Type::f32, count);
    F q = Simd::zero();
    if (scale > 0) {
      const F by = Simd::set1(scale), row = Simd::set1(channel);
      q = Simd::mul(nearest_code<e2m1>(Simd::div(e2m1 ? Simd::div(exact, row) : exact, by)), by);
      q = e2m1 ? Simd::mul(q, row) : q;
    }
    const F weight = load_some(at(a.weight.data, a.weight.type, n * a.k + k), a.weight.type, count);
    store_some(r + k, Type::f32, Simd::sub(Simd::mul(weight, load_some(a.smooth + k, Type::f32, count)), q), count);
    const F e = Simd::sub(q, exact);
    const F noise = Simd::mul(Simd::mul(exact, exact), load_some(a.rounding + k, Type::f32, count));
    return Simd::fma(Simd::mul(e, e), load_some(a.signal + k, Type::f32, count), noise);
  }

  float top_of_some(const float* r, std::int64_t begin, std::int64_t end) const {
    F top = Simd::zero();
    for (std::int64_t k = begin; k < end; k += W) top = Simd::max(top, Simd::abs(load_some(r + k, Type::f32, end - k)));
    return Simd::reduce_max(top);
  }

  static float channel_scale(float top) {
    const float scale = top / row_top;
    return top == 0 ? 1 : bf16_value(bf16_bits(scale > smallest_normal ? scale : smallest_normal));
  }

  // A scale in its stored type.
  float stored(float scale) const {
    if (e2m1) return e4m3_values[e4m3_bits(scale > 448 ? 448 : scale)];
    const float most = largest_of(a.scales), kept = scale > most ? most : scale;
    if (a.scales == Type::f32) return kept;
    return a.scales == Type::bf16 ? bf16_value(bf16_bits(kept)) : f16_value(f16_bits(kept));
  }

  const RoundArguments& a;
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
