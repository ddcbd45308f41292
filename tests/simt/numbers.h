// Number formats bit by bit, as no host type has them all.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "thread.h"

namespace simt {

// Decoders take a register and look at its lowest element. They are lambdas because function pointers are not inlined.
constexpr auto s4 = [](std::uint32_t v) { return static_cast<std::int16_t>(static_cast<std::int32_t>(v << 28) >> 28); };
constexpr auto u4 = [](std::uint32_t v) { return static_cast<std::int16_t>(v & 15); };
constexpr auto s8 = [](std::uint32_t v) { return static_cast<std::int16_t>(static_cast<std::int8_t>(v)); };
constexpr auto bf16_value = [](std::uint32_t v) { return __builtin_bit_cast(float, v << 16); };
constexpr auto f16_value = [](std::uint32_t v) {
  // The exponent is read 112 too low, also for subnormal numbers; infinities and NaN lie beyond every number.
  const float magnitude = __builtin_bit_cast(float, (v & 0x7fff) << 13) * 0x1p112f;
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, magnitude) | (v & 0x8000) << 16;
  return __builtin_bit_cast(float, (v & 0x7c00) == 0x7c00 ? bits | 0x7f800000 : bits);
};
constexpr auto e2m1_value = [](std::uint32_t v) {
  constexpr float magnitudes[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
  return v & 8 ? -magnitudes[v & 7] : magnitudes[v & 7];
};

inline float ue4m3_value(std::uint32_t v) {  // the sign bit is not looked at
  const int exponent = v >> 3 & 15, mantissa = v & 7;
  if ((v & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
  return exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
}

inline std::uint16_t f16_bits(float v) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, v), sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(v);
  if (v != v) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14f)  // subnormal: added to ½, whose last place is 2⁻²⁴, it is rounded by the addition
    return sign | (__builtin_bit_cast(std::uint32_t, magnitude + .5f) - 0x3f000000);
  const std::uint32_t nearest = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | ((nearest >> 13) - (112 << 10));
}

inline float without_subnormals(float v) {
  return std::fabs(v) < 0x1p-126f ? std::copysign(0.f, v) : v;
}

// ---- what PTX leaves open -------------------------------------------------------------------------------------------
inline int rounded_sum(int c, int sum) {
  return static_cast<int>(static_cast<unsigned>(c) + static_cast<unsigned>(sum));
}

inline float rounded_sum(float c, double sum) {
  const double exact = c + sum;
  const float nearest = static_cast<float>(exact);
  return options.truncate && std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.f) : nearest;
}

inline float approximate(double exact, double relative_error) {
  return without_subnormals(static_cast<float>(options.truncate ? exact * (1 - relative_error) : exact));
}

}  // namespace simt
