#include "scalar.h"

#include <bit>
#include <cmath>

namespace nunchaku_py::cpu {

float bf16_value(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

float f16_value(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7FFFu;
  if (rest >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // Moved to where fp32 has exponent and mantissa, the number is 2^-112 times too small, subnormal ones included.
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}

namespace {

float e4m3_value(std::uint8_t bits) {
  const std::uint32_t sign = (bits & 0x80u) << 24, rest = bits & 0x7Fu;
  if (rest == 0x7F) return std::bit_cast<float>(sign | 0x7FC00000u);
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest << 20) * 0x1p120f));
}

struct E4m3Values {
  float all[256];
  E4m3Values() {
    for (int bits = 0; bits < 256; bits++) all[bits] = e4m3_value(static_cast<std::uint8_t>(bits));
  }
};

const E4m3Values values;

}  // namespace

const float (&e4m3_values)[256] = values.all;

std::uint16_t bf16_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return 0x7FC0;
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

std::uint16_t f16_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (value != value) return 0x7E00;
  if (size >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7C00);
  if (size < 0x1p-14f)
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(size * 0x1p24f)));
  const std::uint32_t up = (bits & 0x7FFFFFFFu) + 0xFFF + (bits >> 13 & 1);
  return static_cast<std::uint16_t>(sign | ((up >> 13) - (112u << 10)));
}

std::uint8_t e4m3_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint8_t>(bits >> 24 & 0x80);
  const float size = std::fabs(value);
  if (!(size < 464.0f)) return static_cast<std::uint8_t>(sign | 0x7F);
  if (size < 0x1p-6f) return static_cast<std::uint8_t>(sign | static_cast<std::uint8_t>(std::nearbyint(size * 0x1p9f)));
  const std::uint32_t up = (bits & 0x7FFFFFFFu) + 0x7FFFF + (bits >> 20 & 1);
  return static_cast<std::uint8_t>(sign | ((up >> 20) - (120u << 3)));
}

}  // namespace nunchaku_py::cpu
