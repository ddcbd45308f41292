// h·upᵀ, added to C. In vectors all of it is fp32. AMX multiplies bf16 only, so there, if up is bf16, h goes in two
// parts whose sum has 16 significant bits: fp32 in vectors would cost a third of the time of the INT8 product.
#pragma once
#include "finish.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

struct Branch {
  std::int64_t r;
  bool split;
  std::int64_t words;  // of a row of up or h, as the product takes it

  explicit Branch(const LinearArguments& a)
      : r(a.r),
        split(DotBf16::in_tiles && a.up.type == Type::bf16),
        words(split ? round_up(a.r, 32) : round_up(a.r, W)) {}

  // One row of h, fp32 → `words` words.
  void stage_h(std::int32_t* out, const float* h) const {
    if (!split) return to_floats(reinterpret_cast<float*>(out), h, Type::f32, r, words);
    auto* high = reinterpret_cast<std::uint16_t*>(out);
    for (std::int64_t i = 0; i < words; i += W) {
      const F v = i < r ? load_some(h + i, Type::f32, r - i) : Simd::zero();
      Simd::store_bf16(high + i, v);
      Simd::store_bf16(high + words + i, Simd::sub(v, Simd::load_bf16(high + i)));
    }
  }

  void stage_up(std::int32_t* out, const Array& up, std::int64_t n) const {
    if (!split) return to_floats(reinterpret_cast<float*>(out), at(up.data, up.type, n * r), up.type, r, words);
    auto* twice = reinterpret_cast<std::uint16_t*>(out);
    std::memset(twice, 0, static_cast<std::size_t>(4 * words));
    std::memcpy(twice, at(up.data, up.type, n * r), static_cast<std::size_t>(2 * r));
    std::memcpy(twice + words, twice, static_cast<std::size_t>(2 * r));
  }

  void add(const std::int32_t* up, std::int64_t rows, const std::int32_t* h, std::int64_t vectors, float* c) const {
    if (!words) return;
    if (split)
      product<DotBf16>(up, words, rows, h, vectors, words, c, token_step, true);
    else
      product<DotFloat>(up, words, rows, h, vectors, words, c, token_step, true);
  }
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
