// Arrays of the storage types as vectors of fp32 and back, and the functions of fp32 that epilogues need.
#pragma once
#include "../arguments.h"
#include "product.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float largest_float = std::numeric_limits<float>::max();
constexpr float smallest_normal = std::numeric_limits<float>::min();

constexpr std::int64_t size_of(Type type) {
  return type == Type::f32 ? 4 : 2;
}

inline const void* at(const void* data, Type type, std::int64_t index) {
  return static_cast<const char*>(data) + index * size_of(type);
}
inline void* at(void* data, Type type, std::int64_t index) {
  return static_cast<char*>(data) + index * size_of(type);
}

inline F load_as(const void* p, Type type) {
  if (type == Type::bf16) return Simd::load_bf16(static_cast<const std::uint16_t*>(p));
  if (type == Type::f16) return Simd::load_f16(static_cast<const std::uint16_t*>(p));
  return Simd::load(static_cast<const float*>(p));
}

inline void store_as(void* p, Type type, F a) {
  if (type == Type::bf16) return Simd::store_bf16(static_cast<std::uint16_t*>(p), a);
  if (type == Type::f16) return Simd::store_f16(static_cast<std::uint16_t*>(p), a);
  Simd::store(static_cast<float*>(p), a);
}

inline F round_to(Type type, F a) {
  return type == Type::bf16 ? Simd::round_bf16(a) : type == Type::f16 ? Simd::round_f16(a) : a;
}

// What is empty may be nowhere, and std::memcpy must not be given that.
inline void copy(void* out, const void* from, std::int64_t bytes) {
  if (bytes) std::memcpy(out, from, static_cast<std::size_t>(bytes));
}

// count (up to W) numbers, zeros beside them: nothing past the end is touched.
inline F load_some(const void* p, Type type, std::int64_t count) {
  if (count >= W) return load_as(p, type);
  float padded[W] = {};
  copy(padded, p, count * size_of(type));
  return load_as(padded, type);
}

inline void store_some(void* p, Type type, F a, std::int64_t count) {
  if (count >= W) return store_as(p, type, a);
  float padded[W];
  store_as(padded, type, a);
  std::memcpy(p, padded, static_cast<std::size_t>(count * size_of(type)));
}

inline float number(const void* data, Type type, std::int64_t index) {
  const void* p = at(data, type, index);
  if (type == Type::f32) return *static_cast<const float*>(p);
  const std::uint16_t bits = *static_cast<const std::uint16_t*>(p);
  return type == Type::bf16 ? bf16_value(bits) : f16_value(bits);
}

// `count` numbers as fp32; zeros up to `padded`, a multiple of W.
inline void to_floats(float* out, const void* data, Type type, std::int64_t count, std::int64_t padded) {
  std::int64_t i = 0;
  for (; i + W <= count; i += W) Simd::store(out + i, load_as(at(data, type, i), type));
  for (; i < padded; i += W)
    Simd::store(out + i, count > i ? load_some(at(data, type, i), type, count - i) : Simd::zero());
}

// 2^x by parts: a whole power, and a polynomial of the rest in [−½, ½]; relative error below 2^-22.
inline F exp(F x) {
  x = Simd::min(Simd::max(x, Simd::set1(-87.0f)), Simd::set1(89.0f));  // from 88.4 on the power is infinite
  const F whole = Simd::round(Simd::mul(x, Simd::set1(1.44269504088896f)));
  F rest = Simd::fma(whole, Simd::set1(-0.693145751953125f), x);  // ln 2 in two parts
  rest = Simd::fma(whole, Simd::set1(-1.42860677e-6f), rest);
  F sum = Simd::set1(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = Simd::fma(sum, rest, Simd::set1(term));
  return Simd::mul(sum, Simd::power_of_two(whole));
}

// x·σ(z)
inline F gated(F x, F z) {
  const F one = Simd::set1(1);
  return Simd::div(x, Simd::add(one, exp(Simd::sub(Simd::zero(), z))));
}

inline F gelu_tanh(F x) {  // ½x(1 + tanh u) = x·σ(2u)
  const F cube = Simd::mul(Simd::mul(x, x), x);
  return gated(x, Simd::mul(Simd::set1(1.5957691216057308f), Simd::fma(Simd::set1(0.044715f), cube, x)));
}

// ½x(1 + erf(x/√2)), by erfc(s) ≈ polynomial(t)·e^(−s²), t = 1/(1 + ps): Abramowitz and Stegun 7.1.26, |error|
// < 1.5e-7.
inline F gelu(F x) {
  const F size = Simd::mul(Simd::abs(x), Simd::set1(0.70710678118654752f)), one = Simd::set1(1);
  const F t = Simd::div(one, Simd::fma(Simd::set1(0.3275911f), size, one));
  F sum = Simd::set1(1.061405429f);
  for (const float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    sum = Simd::fma(sum, t, Simd::set1(term));
  const F tail = Simd::mul(Simd::mul(sum, t), exp(Simd::sub(Simd::zero(), Simd::mul(size, size))));
  // x > 0: x − ½x·erfc; x < 0: ½x·erfc.  With p = max(x, 0): p − ½|x|·erfc for both.
  const F positive = Simd::add(Simd::max(x, Simd::zero()), Simd::mul(x, Simd::zero()));  // NaN stays NaN
  return Simd::sub(positive, Simd::mul(Simd::mul(Simd::abs(x), Simd::set1(0.5f)), tail));
}

inline F activate(F x, Activation activation) {
  switch (activation) {
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::silu:
      return gated(x, x);
    default:
      return x;
  }
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
